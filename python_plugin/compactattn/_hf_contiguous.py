"""One chunk over contiguous KV, as ``generate`` keeps it: a pool by strides, an identity block table, no copy."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]

from . import stages
from .api import plan_for
from .batch import Batch
from .means import BlockMeans
from .plan import Plan
from .selection import Summaries
from .settings import Settings

# Tokens a page: the smallest there is, so that the fewest tokens lie outside of whole pages.
PAGE = 16


def chunk(query: Any, key: Any, value: Any, scaling: float | None, settings: Settings) -> Any:
    """Attention of the last q_len of kv_len tokens, ``[batch, q_len, num_q_heads, head_dim]``.

    ``query [batch, num_q_heads, q_len, head_dim]``, ``key``, ``value [batch, num_kv_heads, kv_len, head_dim]`` of any
    strides but the last; kv_len - q_len >= PAGE. Requests of a batch are
    called one by one: the stride from one to the next need not be whole pages. A page must lie within the tensor, which
    need not end on one; so pages are counted from the end, and what is left over at the start, fewer than PAGE tokens
    that every query sees, is attended to beside and merged by its lse.
    """
    batch, heads, q_len, head_dim = query.shape
    out = torch.empty((batch, q_len, heads, head_dim), dtype=query.dtype, device=query.device)
    call = _Call.found((query, key, value), out, scaling, settings)
    for req in range(batch):
        if call:
            call.run(req, query, key, value, out)
        else:
            _request((query[req], key[req], value[req]), out[req], scaling, settings)
    return out


def means(plan: Plan, batch: Batch, settings: Settings) -> Summaries | None:
    """All block means of the batch, where the device cannot make them itself and something reads them."""
    if batch.home.on_cpu or not _reads_means(settings):
        return None
    return BlockMeans(plan, values=settings.mean_correction, seals=False).update(batch, which="all")


@dataclass(frozen=True)
class _Call:
    """One request's forward, made once a chunk: from layer to layer, and request to request, only addresses change.

    It holds none of the tensors it was made from, or a layer's KV would outlive its cache.
    """

    plan: Plan
    args: Any
    struct: Any
    # Bytes from one request to the next of query, key, value and out.
    steps: tuple[int, ...]
    # What args point to: lengths and table, settings by whose identity it is found, workspace.
    held: tuple[Any, ...]

    @classmethod
    def found(cls, tensors: tuple[Any, Any, Any], out: Any, scaling: float | None, settings: Settings) -> _Call | None:
        """What this thread keeps for such a layer; None where a call is more than a forward, or a graph's own."""
        query, key, value = tensors
        if key.shape[2] % PAGE or _reads_means(settings):
            return None
        stream = None
        if query.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch.cuda.current_stream(query.device).cuda_stream
        strides = query.stride(), key.stride(), value.stride()
        at = (query.shape, key.shape, strides, query.dtype, query.device, scaling, id(settings), stream)
        calls: dict[Any, _Call] = _local.__dict__.setdefault("calls", {})
        call = calls.get(at)
        if call is None:
            if len(calls) >= _MOST_CALLS:
                calls.clear()
            call = calls[at] = cls._of(tensors, out, scaling, settings, stream)
        return call

    @classmethod
    def _of(
        cls, tensors: tuple[Any, Any, Any], out: Any, scaling: float | None, settings: Settings, stream: int | None
    ) -> _Call:
        batch = _batch(*(tensor[0] for tensor in tensors))
        plan = plan_for(batch, settings=_planned(settings, tensors[0].shape[2], tensors[1].shape[2]), sm_scale=scaling)
        memory = plan.workspace(batch, stream)
        args = plan.arguments(batch, out[0], scratch=memory, stream=stream)
        lengths = tuple(view.owner for view in (batch.block_table, batch.seq_lens, batch.cu_seqlens_q))
        steps = tuple(tensor.stride(0) * tensor.element_size() for tensor in (*tensors, out))
        return cls(plan, args, batch.struct, steps, (*lengths, settings, memory))

    def run(self, req: int, query: Any, key: Any, value: Any, out: Any) -> None:
        """Attention of one request of a layer."""
        args, struct, steps = self.args, self.struct, self.steps
        struct.q.data = query.data_ptr() + req * steps[0]
        struct.k.data = key.data_ptr() + req * steps[1]
        struct.v.data = value.data_ptr() + req * steps[2]
        args.out.data = out.data_ptr() + req * steps[3]
        self.plan.run(args)


def _request(tensors: tuple[Any, Any, Any], out: Any, scaling: float | None, settings: Settings) -> None:
    query, key, value = tensors
    head = key.shape[1] % PAGE
    batch = _batch(query, key[:, head:], value[:, head:])
    plan = plan_for(batch, settings=_planned(settings, query.shape[1], key.shape[1]), sm_scale=scaling)
    summaries = means(plan, batch, settings)
    if not head:
        plan.forward(batch, out, summaries=summaries)
        return
    paged, lse = torch.empty_like(out), torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    plan.forward(batch, paged, lse, summaries=summaries)
    rest = _seen_by_all(query, key[:, :head], value[:, :head], scaling)
    stages.combine(plan, (paged, lse), rest, out)


def _planned(settings: Settings, q_len: int, kv_len: int) -> Settings:
    """A whole prompt at once has no past to choose from: one span takes the least room, of many each its own."""
    return settings.replace(query_span=0) if q_len == kv_len else settings


def _reads_means(settings: Settings) -> bool:
    return settings.selector in stages.READS_MEANS or settings.mean_correction


def _batch(query: Any, key: Any, value: Any) -> Batch:
    q_len, kv_len, device = query.shape[1], key.shape[1], query.device
    if not query.is_cuda:
        lengths = _lengths(q_len, kv_len, device, None)
    elif torch.cuda.is_current_stream_capturing():
        # What a graph computes is there when it is replayed: nobody else's.
        lengths = _lengths.__wrapped__(q_len, kv_len, device, None)
    else:
        lengths = _lengths(q_len, kv_len, device, torch.cuda.current_stream(device).cuda_stream)
    return Batch.of(query.transpose(0, 1), _pool(key), _pool(value), *lengths)


@functools.lru_cache(maxsize=8)
def _lengths(q_len: int, kv_len: int, device: Any, stream: int | None) -> tuple[Any, Any, Any]:
    """block_table, seq_lens, cu_seqlens_q; all layers of a step ask for the same, on one stream."""
    ints = {"dtype": torch.int32, "device": device}
    pages = torch.arange(kv_len // PAGE, **ints)
    return pages[None], torch.full((1,), kv_len, **ints), torch.arange(0, q_len + 1, q_len, **ints)


def _pool(tokens: Any) -> Any:
    """``[heads, tokens, dim]`` seen as ``[pages, PAGE, heads, dim]``."""
    return tokens.unflatten(1, (-1, PAGE)).permute(1, 2, 0, 3)


def _seen_by_all(query: Any, key: Any, value: Any, scaling: float | None) -> tuple[Any, Any]:
    """Dense attention of every query to every key: ``(out [q_len, heads, dim], lse [heads, q_len])``."""
    heads, q_len, dim = query.shape
    grouped = query.float().unflatten(0, (key.shape[0], -1))
    scores = grouped @ key.float().mT[:, None] * (dim**-0.5 if scaling is None else scaling)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ value.float()[:, None]
    return out.reshape(heads, q_len, dim).transpose(0, 1).to(query.dtype), lse.reshape(heads, q_len)


# Chunks of a prompt follow each other: those before are not asked for again.
_MOST_CALLS = 8
_local = threading.local()
# A forked child may use none of its parent's plans.
os.register_at_fork(after_in_child=lambda: _local.__dict__.clear())
