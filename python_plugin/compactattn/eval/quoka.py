"""quoka (arXiv 2602.08722) in torch, for devices on which the library has none: token lists, attended to by sdpa.

The definition is the library's own (rust/select/quoka.rs), which it is checked against on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from torch.nn.functional import normalize, scaled_dot_product_attention

from .._stats import Stats
from ..errors import E_VALUE, invalid
from ..settings import Settings
from .pool import PAGE, Step


def attend(q: Any, pools: tuple[Any, Any], step: Step, settings: Settings, scaling: float) -> tuple[Any, Stats]:
    """A step's attention ``[total_q, heads, head_dim]``, and what it has selected.

    ``q [total_q, heads, head_dim]``; ``pools``: K and V ``[pages, PAGE, num_kv_heads, head_dim]``, this step's in them.
    """
    if settings.keep != "density" or settings.sink_blocks or settings.local_blocks:
        raise invalid(E_VALUE, "settings.keep", "density, and no block forced, for quoka in torch", settings.keep)
    outs, counted, first = [], Stats(), 0
    for row, (kv_len, count) in zip(step.table, step.spans, strict=True):
        own = q[first : first + count]
        pages = row[: -(-kv_len // PAGE)].long()
        k, v = (pool[pages].flatten(0, 1)[:kv_len] for pool in pools)
        out, found = _request(own, k, v, settings, scaling)
        outs.append(out)
        counted += found
        first += count
    return torch.cat(outs), counted


def _request(q: Any, k: Any, v: Any, settings: Settings, scaling: float) -> tuple[Any, Stats]:
    count, kv_len, kv_heads = len(q), len(k), k.shape[1]
    past = kv_len - count
    dense = count <= settings.dense_max_q_len or kv_len < settings.dense_below_kv_len
    kept = past if dense else _kept(settings, past)
    if kept < past:
        chosen = _scores(q, k[:past], settings).topk(kept, dim=-1).indices
        k, v = (_listed(x, chosen, past) for x in (k, v))
    else:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    group = q.shape[1] // kv_heads
    every = torch.ones((count, kept + count), dtype=torch.bool, device=q.device)
    # Each query sees the list, and its chunk up to itself.
    mask, given = every.tril(kept), [x.repeat_interleave(group, 0)[None] for x in (k, v)]
    out = scaled_dot_product_attention(q.transpose(0, 1)[None], *given, attn_mask=mask, scale=scaling)
    candidates = 0 if dense else past * kv_heads
    return out[0].transpose(0, 1), Stats(candidates=candidates, selected=0 if dense else kept * kv_heads)


def _kept(settings: Settings, past: int) -> int:
    """``ceil`` of the share, as rust/select/keep.rs rounds it; all of it behind the guard."""
    share = min(max(settings.keep_value, settings.min_density), settings.max_density)
    kept = past if share >= 1 else math.ceil(share * past * (1 - 2**-23))
    return past if kept > settings.density_guard * past else kept


def _scores(q: Any, k: Any, settings: Settings) -> Any:
    """``[num_kv_heads, past]``: the best cosine of each past key with an averaged unusual query."""
    unusual = _unusual(q, k.shape[1], settings.quoka_query_ratio)
    keys = normalize(k.float(), dim=-1, eps=_SHORTEST).transpose(0, 1)
    best = [(keys @ some.transpose(1, 2)).amax(-1) for some in unusual.split(_QUERIES, 1)]
    return torch.stack(best).amax(0)


def _unusual(q: Any, kv_heads: int, ratio: float) -> Any:
    """``[num_kv_heads, kept, head_dim]``: unit queries least like their head's mean, averaged rank by rank."""
    count, heads, dim = q.shape
    kept = max(1, math.floor(ratio * count))
    wide = q.double()
    cosine = (wide * wide.sum(0)).sum(-1) / wide.norm(dim=-1).clamp(min=_SHORTEST)
    order = cosine.argsort(dim=0, stable=True)[:kept]
    ranked = q.float().gather(0, order[..., None].expand(-1, -1, dim))
    unit = normalize(ranked, dim=-1, eps=_SHORTEST)
    return unit.unflatten(1, (kv_heads, heads // kv_heads)).mean(2).transpose(0, 1)


def _listed(x: Any, chosen: Any, past: int) -> Any:
    """``[num_kv_heads, kept + count, head_dim]``: each head's tokens, then the chunk's own."""
    by_head = x.transpose(0, 1)
    listed = by_head.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([listed, by_head[:, past:]], 1)


# Shorter vectors are like nothing.
_SHORTEST = 1e-12
# Averaged queries at a time: their products with all past keys are held.
_QUERIES = 128
