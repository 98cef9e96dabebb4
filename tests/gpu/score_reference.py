"""Scores from the definitions in rust/select, in f64; each with a bound on f32's relative error."""

from __future__ import annotations

import dataclasses
import math

import torch
from params import Span
from score_case import Case, Gate

# The tensor cores add 16 products and the running sum with 24 bits, truncated: at most 2^-22 of the
# magnitudes added so far, each time.
TENSOR_STEP = 2.0**-22
EPS = 2.0**-23


def flashprefill(case: Case, span: Span) -> tuple[torch.Tensor, float]:
    """Summed weights relative to the best block, by means of the queries' dtype: products are exact."""
    s = case.shape
    keys = case.means[span.req][: span.kv_end // s.block].repeat_interleave(s.group, 1)
    queries = case.rows(span)
    logits = torch.einsum("ihd,jhd->hij", queries, keys) * case.sm_scale
    ends = (torch.arange(len(keys), device="cuda") + 1) * s.block
    visible = span.kv_end - span.len + 1 + torch.arange(span.len, device="cuda")
    logits = logits.masked_fill((ends[None, :] > visible[:, None])[None], -math.inf)
    sums = logits.logsumexp(1)
    past = span.past // s.block
    best = sums[:, : past if s.relative_to_past else None].nan_to_num(nan=-math.inf).amax(1, keepdim=True)
    size = torch.einsum("ihd,jhd->hij", queries.abs(), keys.abs()).nan_to_num(nan=0).max().item() * case.sm_scale
    logit = size * s.dim / 16 * TENSOR_STEP
    # Sums of `len` weights of 2 EPS each; logarithms up to `size + log2(len)` rounded a few times.
    bound = 2 * (logit + span.len * EPS + 4 * EPS * (1.5 * size + 10))
    return (sums - best).exp()[:, :past], bound


def xattention(case: Case, span: Span) -> tuple[torch.Tensor, float]:
    """Each block's share of a softmax over key groups, averaged over the span's rows."""
    s, keys, queries = case.shape, case.keys[span.req], case.rows(span)
    past, per_block = span.past // s.block, s.block // s.stride
    out = torch.zeros(s.heads, past, dtype=torch.float64, device="cuda")
    size = 0.0
    for first in range(0, span.len, s.stride):
        rows = min(s.stride, span.len - first)
        n = span.kv_end - span.len + first + rows
        t = torch.arange(n, device="cuda")
        meets = queries[first + rows - 1 - (t % s.stride) % rows]
        each = meets * keys[:n].repeat_interleave(s.group, 1)
        groups = -(-n // s.stride)
        count = torch.full((groups,), s.stride, dtype=torch.float64, device="cuda")
        count[-1] = n - (groups - 1) * s.stride

        def by_group(x: torch.Tensor, groups: int = groups) -> torch.Tensor:
            padded = x.new_zeros(groups * s.stride, s.heads)
            padded[: len(x)] = x
            return padded.unflatten(0, (groups, s.stride)).sum(1).T

        logits = by_group(each.sum(-1)) / count * case.sm_scale + (count / s.stride).log()
        size = max(size, (by_group(each.abs().sum(-1)) / count).nan_to_num(nan=0).max().item() * case.sm_scale)
        shares = logits.softmax(1)[:, : past * per_block].unflatten(1, (past, per_block)).sum(2)
        out += shares * rows / span.len
    # A share is a quotient: its own weights' error and that of the total. Sums of `groups` terms, and cells whose
    # logarithms (up to 1.5 * size + 8) are rounded.
    logit = size * s.stride * s.dim / 16 * TENSOR_STEP
    return out, 2 * (logit + 4 * EPS * (1.5 * size + 8) + 32 * EPS) + groups / 32 * EPS


@dataclasses.dataclass
class GateCase:
    """Weights `k [heads, 3 * dim, gate_dim]`, `q` or None, frequencies; f32 on the device."""

    k: torch.Tensor
    q: torch.Tensor | None
    inv_freq: torch.Tensor
    gate_inv_freq: torch.Tensor
    rope_scale: float
    interleaved: bool
    by_group: bool

    @staticmethod
    def random(case: Case, form: str, gate_dim: int, interleaved: bool) -> GateCase:
        """`form`: keys, both or group."""
        s = case.shape
        gen = torch.Generator(device="cuda").manual_seed(7)

        def normal(*extents: int) -> torch.Tensor:
            return torch.randn(*extents, generator=gen, device="cuda") * 2 / math.sqrt(extents[1])

        k = normal(s.heads if form == "keys" else s.kv_heads, 3 * s.dim, gate_dim)
        q = {
            "keys": lambda: None,
            "both": lambda: normal(s.heads, s.dim, gate_dim),
            "group": lambda: normal(s.kv_heads, s.group * s.dim, gate_dim),
        }[form]()
        freq = [torch.tensor([1e4 ** (-2 * i / n) for i in range(n // 2)], device="cuda") for n in (s.dim, gate_dim)]
        return GateCase(k, q, *freq, 1.25, interleaved, form == "group")

    def struct(self) -> Gate:
        """The kernels' argument."""
        pointers = [t.data_ptr() if t is not None else 0 for t in (self.k, self.q, self.inv_freq, self.gate_inv_freq)]
        heads, _, gate_dim = self.k.shape
        return Gate(*pointers, self.rope_scale, int(self.interleaved), heads, gate_dim, int(self.by_group))

    def turn(self, x: torch.Tensor, positions: torch.Tensor, back: bool) -> torch.Tensor:
        """Rotates `x [tokens, ..., dim]` by angles rounded to f32."""
        freq = self.inv_freq if back else self.gate_inv_freq
        angle = (positions.float()[:, None] * freq).double()
        factor = 1 / self.rope_scale if back else self.rope_scale
        cos, sin = angle.cos() * factor, angle.sin() * (-factor if back else factor)
        shape = (len(x), *[1] * (x.dim() - 2), -1)
        cos, sin = cos.view(shape), sin.view(shape)
        a, b = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        low, high = a * cos - b * sin, b * cos + a * sin
        return torch.stack((low, high), -1).flatten(-2) if self.interleaved else torch.cat((low, high), -1)


def attn_gate(case: Case, span: Span, gate: GateCase) -> tuple[torch.Tensor, float]:
    """Softmax of gate queries with gate keys over the blocks that the span's last token sees."""
    s, first = case.shape, span.kv_end - span.len
    plain = gate.turn(case.rows(span), first + torch.arange(span.len, device="cuda"), True).mean(0)
    if gate.q is None:
        query = plain
    elif gate.by_group:
        query = torch.einsum("hi,hio->ho", plain.view(s.kv_heads, -1), gate.q.double()).repeat_interleave(s.group, 0)
    else:
        query = torch.einsum("hi,hio->ho", plain, gate.q.double())
    query = gate.turn(query[None], torch.tensor([first], device="cuda"), False)[0]
    keys = gate.turn(case.keys[span.req][: span.kv_end], torch.arange(span.kv_end, device="cuda"), True)
    blocks = keys.split(s.block)
    features = torch.stack([torch.cat((b.amax(0), b.amin(0), b.mean(0)), -1) for b in blocks])  # [blocks, kv, 3 dim]
    weights = gate.k if len(gate.k) == s.heads else gate.k.repeat_interleave(s.group, 0)
    features = features.repeat_interleave(s.group, 1)
    projected = torch.einsum("jhi,hio->jho", features, weights.double())
    projected = gate.turn(projected, s.block * torch.arange(len(blocks), device="cuda"), False)
    gate_dim = gate.k.shape[2]
    logits = torch.einsum("ho,jho->hj", query, projected) / math.sqrt(gate_dim)
    # Of n roundings in a chain of sums none knows of another: together sqrt(n) of one, here 8 sigma of the largest
    # logit's terms; a share is a quotient.
    size = torch.einsum("ho,jho->hj", query.abs(), projected.abs()).nan_to_num(nan=0).max().item()
    size *= gate.rope_scale**2 / math.sqrt(gate_dim)
    n = 3 * s.dim + s.block + s.group * s.dim + gate_dim
    return logits.softmax(1)[:, : span.past // s.block], 2 * 8 * math.sqrt(n) * EPS / 2 * (size + 1) + 1e-5
