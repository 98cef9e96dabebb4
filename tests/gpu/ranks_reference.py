"""Single tokens of a step against plain attention in float64, over the KV that their lists name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import compactattn
import torch
from compactattn import stages
from ranks_engine import Chunk, Scale
from torch import Tensor


class Wrong(Exception):
    """An answer that is not right."""


@dataclass(frozen=True)
class Given:
    """One layer's forward: its plan and tensors, ``out [total_q, heads, dim]``, ``lse [heads, total_q]``."""

    scale: Scale
    plan: compactattn.Plan
    batch: compactattn.Batch
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    chunks: list[Chunk]


def judge(given: Given, chunk: Chunk, tokens: list[int]) -> float:
    """Raises Wrong unless all heads of those tokens are right; the share of visible KV that they read.

    The lists are what select, union and table give for the same step once more; attention over their tables must have
    the bits of the whole pass. In mode dense there are no lists to ask: all KV is read.
    """
    scale, device = given.scale, given.q.device
    seen = torch.arange(chunk.end, device=device)
    pages = pages_of(chunk).to(device)
    slots = pages[seen // scale.page_size] * scale.page_size + seen % scale.page_size
    # [kv_len, num_kv_heads, head_dim].
    k, v = (pool.flatten(0, 1)[slots].double() for pool in (given.k, given.v))
    lists = None if given.plan.settings().selector == "dense" else Lists(given)
    read = total = 0
    for token in tokens:
        visible = chunk.first + token + 1
        kept = (seen < visible).expand(scale.num_q_heads, -1)
        if lists is not None:
            kept = kept & lists.kept(chunk, token)
        read, total = read + int(kept.sum()), total + scale.num_q_heads * visible
        agrees(given, chunk.row + token, kept, (k, v))
    if lists is not None and not torch.equal(lists.out.view(torch.int16), given.out.view(torch.int16)):
        raise Wrong("forward and the stages differ")
    return read / total


def agrees(given: Given, row: int, kept: Tensor, kv: tuple[Tensor, Tensor]) -> None:
    """Softmax of the kept keys in float64.

    A row of bf16 is off by the rounding of its weights and of the result, 2^-8 of what they weigh each, and by f32
    sums: the bound of tests/gpu_suite/rows.rs.
    """
    scale = given.scale
    q = given.q[row].double().unflatten(0, (scale.num_kv_heads, -1))
    logits = torch.einsum("hgd,khd->hgk", q, kv[0]).flatten(0, 1) * scale.head_dim**-0.5
    logits = logits.masked_fill(~kept, -torch.inf)
    weights = logits.softmax(-1).unflatten(0, q.shape[:2])
    want = torch.einsum("hgk,khd->hgd", weights, kv[1]).flatten(0, 1)
    spread = torch.einsum("hgk,khd->hgd", weights, kv[1].abs()).flatten(0, 1)
    off, bound = (given.out[row].double() - want).abs(), (spread + want.abs()) / 256 + 1e-3 * spread
    # Not "off > bound": NaN is wrong too.
    bad = ~(off <= bound)
    if bad.any():
        head, i = bad.nonzero()[0].tolist()
        raise Wrong(f"row {row}, head {head}: out[{i}] {given.out[row, head, i]:.6g}, not {want[head, i]:.6g}")
    far = ~((given.lse[:, row].double() - logits.logsumexp(-1)).abs() <= 1e-3)
    if far.any():
        head = int(far.nonzero()[0])
        raise Wrong(f"row {row}, head {head}: lse {given.lse[head, row]:.6g}, not {logits[head].logsumexp(-1):.6g}")


class Lists:
    """The lists of a step, by the stages one by one."""

    def __init__(self, given: Given) -> None:
        plan, batch, layer = given.plan, given.batch, given.layer
        self.scale, self.chunks, self.sizes = given.scale, given.chunks, plan.sizes(layer)
        self.settings, self.device = plan.settings(layer), given.q.device
        lists = stages.union(plan, batch, stages.select(plan, batch, layer=layer), layer=layer)
        table = stages.table(plan, batch, lists, layer=layer)
        self.out = torch.full_like(given.out, torch.nan)
        stages.attend(plan, batch, table, self.out, layer=layer)
        self.counts, self.lens, self.boxes = (tensor_of(x) for x in (table.counts, table.stream_lens, table.boxes))

    def kept(self, chunk: Chunk, token: int) -> Tensor:
        """``[num_q_heads, kv_len]``: what the lists of the token's span name."""
        span, heads = self.settings.query_span, self.scale.num_q_heads
        before = sum(-(-other.count // span) for other in self.chunks[: self.chunks.index(chunk)])
        first = (before + token // span) * self.sizes.lists_per_span
        end = chunk.first + min((token // span + 1) * span, chunk.count)
        # One head a list, as the presets have it.
        kept = torch.zeros(heads, chunk.end, dtype=torch.bool, device=self.device)
        for head in range(heads):
            kept[head, self._tokens(first + head, chunk, end)] = True
        return kept

    def _tokens(self, row: int, chunk: Chunk, end: int) -> Tensor:
        """A row's KV tokens: ascending, on the request's own pages, all of the chunk's up to ``end`` among them."""
        size, count, tokens = self.sizes.box_tokens, int(self.counts[row]), int(self.lens[row])
        boxes, per_page = self.boxes[row, :count].long(), self.scale.page_size // size
        place = torch.full((self.scale.num_pages,), -1, device=self.device)
        owned = pages_of(chunk).to(self.device)
        place[owned] = torch.arange(len(owned), device=self.device)
        pages = place[boxes // per_page]
        if (pages < 0).any():
            raise Wrong(f"list {row} names a page of another request")
        starts = pages * self.scale.page_size + boxes % per_page * size
        named = (starts[:, None] + torch.arange(size, device=self.device)).flatten()[:tokens]
        if len(named) != tokens or not (named.diff() > 0).all() or int(named[-1]) != end - 1:
            raise Wrong(f"list {row}: {count} boxes, {tokens} tokens, not ascending to {end}")
        if int((named >= chunk.first).sum()) != end - chunk.first:
            raise Wrong(f"list {row} leaves out tokens of its own chunk")
        return named


def pages_of(chunk: Chunk) -> Tensor:
    """All pages of the chunk's request, int64 on the CPU."""
    return torch.frombuffer(chunk.request.pages, dtype=torch.int32).long()


def tensor_of(array: Any) -> Tensor:
    """A stage's result as torch's."""
    return array if isinstance(array, Tensor) else torch.from_dlpack(array)
