"""One step of continuous batching (transformers 5.17) over the engine's own paged cache, without its dense copy."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
import transformers  # type: ignore[import-not-found, unused-ignore]

from . import _hf_engine as engine
from ._hf_contiguous import means
from .api import plan_for
from .batch import Batch
from .errors import Unsupported
from .plan import Plan
from .settings import Settings


@dataclass(frozen=True)
class Step:
    """One layer's part of what the engine hands over; tensors on the model's device, lengths of both ends on host."""

    cache: Any
    layer: int
    # [num_reqs + 1] int32: packed queries, and KV tokens of this kind of layer.
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    # The longest request's KV tokens, or more.
    max_seqlen_k: int
    # Token slots: of all KV tokens (empty where no request has a past), and of the new ones.
    read_index: list[Any]
    write_index: list[Any]
    # Keys a query sees, itself included.
    window: int

    @classmethod
    def of(cls, module: Any, kwargs: dict[str, Any]) -> Step:
        """Takes the step's fields out of ``kwargs``. Raises Unsupported for an engine that hands over others."""
        if not kwargs.keys() >= _FIELDS or kwargs.pop("block_table", None) is not None:
            text = (
                "E_UNSUPPORTED: paged|compactattn: wanted continuous batching as transformers 5.17 hands it over, got "
                f"another call of transformers {transformers.__version__}; use compactattn with generate() instead"
            )
            raise Unsupported(8, "E_UNSUPPORTED", text)
        cache = kwargs.pop("cache")
        window = cache.sliding_windows[module.layer_idx]
        kind = "full_attention" if window == 1 else "sliding_attention"
        cu_seqlens_k, max_seqlen_k = kwargs.pop("cu_seq_lens_k"), kwargs.pop("max_seqlen_k")
        by_kind = isinstance(cu_seqlens_k, dict)
        return cls(
            cache=cache,
            layer=module.layer_idx,
            cu_seqlens_q=kwargs.pop("cu_seq_lens_q"),
            cu_seqlens_k=cu_seqlens_k[kind] if by_kind else cu_seqlens_k,
            max_seqlen_k=max_seqlen_k[kind] if by_kind else max_seqlen_k,
            read_index=kwargs.pop("read_index"),
            write_index=kwargs.pop("write_index"),
            window=2**31 if window == 1 else window,
        )

    @property
    def slides(self) -> bool:
        """Whether this layer's KV is a window, which the engine keeps as a ring."""
        return self.window < 2**31

    def write(self, key: Any, value: Any) -> tuple[Any, Any, Any]:
        """Writes the new tokens; the layer's pools ``[pages, page_size, num_kv_heads, head_dim]`` and block table."""
        group, index = self.cache.layer_index_to_group_indices[self.layer]
        pools = []
        for pool, new in ((self.cache.key_cache[index], key), (self.cache.value_cache[index], value)):
            pool.index_copy_(0, self.write_index[group], new[0].transpose(0, 1))
            pools.append(pool.unflatten(0, (-1, self.cache.block_size)))
        # Without a past, what is written is all there is.
        slots = self.read_index[group] if self.read_index[group].numel() else self.write_index[group]
        return pools[0], pools[1], self._block_table(slots)

    def keep(self, plan: Plan) -> None:
        """Keeps a plan as long as the cache: a graph captured over that goes on using the plan's workspace."""
        if self.cu_seqlens_q.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.setdefault(self.cache, set()).add(plan)

    def gather(self, key: Any, value: Any) -> tuple[Any, Any]:
        """The engine's own update: writes the new tokens and copies all KV of the step, ``[1, heads, tokens, dim]``."""
        k, v = self.cache.update(key, value, self.layer, self.read_index, self.write_index)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def _block_table(self, slots: Any) -> Any:
        # A page is where its first token lies. Behind a request's end come others' pages, which nobody reads.
        size = self.cache.block_size
        firsts = torch.arange(0, max(self.max_seqlen_k, 1), size, device=slots.device)
        at = (self.cu_seqlens_k[:-1, None] + firsts).clamp(max=slots.shape[0] - 1)
        return (slots[at] // size).to(torch.int32)


def attention(
    module: Any, tensors: tuple[Any, Any, Any], step: Step, settings: Settings, kwargs: dict[str, Any]
) -> Any:
    """``query [1, num_q_heads, tokens, head_dim]`` over the cache, with the new ``key``, ``value`` written first."""
    if step.slides:
        return _engine(engine.SLIDING, module, tensors, step, kwargs)
    query, key, value = tensors
    if key.shape != value.shape:
        return _engine(f"values of {value.shape[-1]}", module, tensors, step, kwargs)
    try:
        k, v, table = step.write(key, value)
        q = query[0].transpose(0, 1)
        seq_lens = (step.cu_seqlens_k[1:] - step.cu_seqlens_k[:-1]).to(torch.int32)
        batch = Batch.of(q, k, v, table, seq_lens, step.cu_seqlens_q.to(torch.int32))
        plan = plan_for(batch, settings=settings, sm_scale=kwargs.get("scaling"))
        step.keep(plan)
    except Unsupported as error:
        # What was written the engine writes again, the same.
        return _engine(str(error), module, tensors, step, kwargs)
    # Rows of no request, the padding of a graph, stay zero.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    plan.forward(batch, out, summaries=means(plan, batch, settings))
    engine.served["compactattn"] += 1
    return out[None], None


def _engine(reason: str, module: Any, tensors: tuple[Any, Any, Any], step: Step, kwargs: dict[str, Any]) -> Any:
    query, *new = tensors
    key, value = step.gather(*new)
    mask = engine.packed_mask(step.cu_seqlens_q, step.cu_seqlens_k, (query.shape[2], key.shape[2]), step.window)
    return engine.attention(reason, module, (query, key, value), mask, kwargs)


_captured: weakref.WeakKeyDictionary[Any, set[Plan]] = weakref.WeakKeyDictionary()
_FIELDS = {"cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_seqlen_k", "read_index", "write_index"}
