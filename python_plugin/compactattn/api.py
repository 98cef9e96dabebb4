"""The short way: one call from tensors to attention, or to page tables. Plans are made once per shape and kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from . import context, stages
from ._abi import Dtype
from ._stats import Stats
from .arrays import Array
from .batch import Batch
from .errors import E_SHAPE, E_VALUE, InvalidArgument, invalid
from .plan import Plan, PlanDesc
from .selection import Csr, Padded, Summaries
from .settings import Settings, whole
from .tensors import Bf16


def forward(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    *,
    settings: Settings | str | None = None,
    sm_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    max_kv_len: int | None = None,
    summaries: Summaries | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    on: context.Context | None = None,
    stream: int | None = None,
) -> Any:
    """Chunked-prefill attention over a paged KV cache; ``out``, or ``(out, lse)`` with ``return_lse``.

    ``q [total_q, num_q_heads, head_dim]`` (bf16, f16 or f32), caches ``[num_pages, page_size, num_kv_heads, head_dim]``
    with any strides, ``block_table [num_reqs, width]``, ``seq_lens [num_reqs]`` (this chunk included), ``cu_seqlens_q
    [num_reqs + 1]`` int32. Tensors: NumPy, any DLPack producer (torch), uint16 words tagged by ``compactattn.bf16``.
    Caches are of q's type or e4m3 (``torch.float8_e4m3fn``, or uint8 tagged by ``compactattn.e4m3``), whose numbers are
    multiplied by ``k_scale`` and ``v_scale``, f32 ``[1]`` or ``[num_kv_heads]`` (None = 1).
    ``settings``: a Settings, a mode's name, or None for mode compactattn. ``lse [num_q_heads, total_q]`` f32, natural.

    On CUDA all tensors are the device's, lengths and tables too: nothing is read back, so ``max_kv_len`` (None = what
    block_table's width holds) is the caller's word, rounded up. ``stream`` is a cudaStream_t (None = torch's current
    one); selectors that read block means get them as ``summaries`` (see BlockMeans).

    Results are new tensors of q's kind unless given. On any exception nothing was written.
    """
    batch = Batch.of(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, k_scale=k_scale, v_scale=v_scale)
    plan = plan_for(batch, settings=settings, sm_scale=sm_scale, max_kv_len=max_kv_len, on=on)
    if out is None:
        out = _result(batch, ("out", batch.q.shape, batch.q.dtype), q, stream)
    if lse is None and return_lse:
        total_q, heads, _ = batch.q.shape
        lse = _result(batch, ("lse", (heads, total_q), Dtype.F32), q, stream)
    written = Bf16(out) if isinstance(q, Bf16) and not isinstance(out, (Array, Bf16)) else out
    plan.forward(batch, written, lse, summaries=summaries, stream=stream)
    return (out, lse) if return_lse else out


def tables(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    *,
    form: str = "padded",
    settings: Settings | str | None = None,
    sm_scale: float | None = None,
    max_kv_len: int | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> Padded | Csr:
    """The page tables another engine's paged kernel should read, ``padded`` (FlashAttention) or ``csr`` (FlashInfer).

    Tensors and numbers as in :func:`forward`, which selects the same by them. Row = (span, list); with ``query_span`` 0
    and ``heads_per_list`` 0 in ``settings`` that is (request, KV head), what such kernels can take.
    """
    exports = {"padded": stages.export_padded, "csr": stages.export_csr}
    if form not in exports:
        raise invalid(E_SHAPE, "form", "padded|csr", repr(form))
    batch = Batch.of(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, k_scale=k_scale, v_scale=v_scale)
    plan = plan_for(batch, settings=settings, sm_scale=sm_scale, max_kv_len=max_kv_len)
    lists = stages.union(plan, batch, stages.select(plan, batch))
    export: Any = exports[form]
    result: Padded | Csr = export(plan, batch, lists)
    return result


def plan_for(
    batch: Batch,
    *,
    settings: Settings | str | None = None,
    sm_scale: float | None = None,
    max_kv_len: int | None = None,
    on: context.Context | None = None,
) -> Plan:
    """The plan that :func:`forward` uses for such a batch; limits are rounded up so that plans are few.

    They come from shapes alone, but for ``max_kv_len`` where it is given.
    """
    if isinstance(settings, str):
        settings = Settings.mode(settings)
    shapes = batch.q.shape, batch.k.shape, batch.block_table.shape
    if [len(shape) for shape in shapes] != _NDIMS:
        raise _wrong_ndim(shapes)
    (total_q, num_q_heads, head_dim), (_, page_size, num_kv_heads, _), (num_reqs, width) = shapes
    longest = width * page_size if max_kv_len is None else whole("max_kv_len", max_kv_len, 63)
    if max_kv_len is not None and longest < 1:
        raise invalid(E_VALUE, "max_kv_len", "at least 1", max_kv_len)
    key = _Key(
        on or batch.home.context(),
        (num_q_heads, num_kv_heads, head_dim, page_size),
        (batch.q.dtype, Dtype.E4M3 if batch.k.dtype is Dtype.E4M3 else None),
        (_rounded(num_reqs), _rounded(total_q), _rounded(longest)),
        sm_scale,
        settings,
    )
    return _plans.get(key)


def stats() -> Stats:
    """What all :func:`forward` calls of this process have selected."""
    return _plans.stats()


class _Key(NamedTuple):
    """What tells plans apart here: cheaper to make and to compare than a PlanDesc."""

    on: context.Context
    # num_q_heads, num_kv_heads, head_dim, page_size.
    shape: tuple[int, int, int, int]
    # Of q; of the cache, None: q's.
    dtypes: tuple[Dtype, Dtype | None]
    # max_num_reqs, max_total_q, max_kv_len.
    limits: tuple[int, int, int]
    sm_scale: float | None
    settings: Settings | None

    def plan(self) -> Plan:
        of_q, of_kv = self.dtypes
        kv_dtype = None if of_kv is None else of_kv.name.lower()
        desc = PlanDesc(
            *self.shape, of_q.name.lower(), *self.limits, kv_dtype, sm_scale=self.sm_scale, settings=self.settings
        )
        return Plan(desc, self.on)


class _Plans:
    """The latest plans; those that fall out leave their statistics behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[_Key, Plan] = OrderedDict()
        self._past = Stats()

    def get(self, key: _Key) -> Plan:
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
                return plan
            plan = self._plans[key] = key.plan()
            if len(self._plans) > _MAX_PLANS:
                self._past += self._plans.popitem(last=False)[1].stats()
            return plan

    def stats(self) -> Stats:
        with self._lock:
            return sum((plan.stats() for plan in self._plans.values()), self._past)


def _result(batch: Batch, what: tuple[str, tuple[int, ...], Dtype], q: Any, stream: int | None) -> Any:
    """New memory (name, shape, dtype) beside q, as the kind of tensor that q is."""
    made = batch.home.empty(*what, stream)
    return made.like(q.words if isinstance(q, Bf16) else q) if batch.home.on_cpu else made


def _wrong_ndim(shapes: tuple[tuple[int, ...], ...]) -> InvalidArgument:
    three = zip(("q", "k_cache", "block_table"), shapes, _NDIMS, strict=True)
    name, shape, ndim = next(one for one in three if len(one[1]) != one[2])
    return invalid(E_SHAPE, name, f"{ndim} dimensions", len(shape))


def _rounded(count: int) -> int:
    """The next power of two, within what a plan may hold."""
    return min(1 << max(count - 1, 0).bit_length(), 2**31 - 1) if count < 2**31 else count


def _forget() -> None:
    # A forked child may use none of its parent's handles, nor a lock that another thread held.
    global _plans
    _plans = _Plans()


_MAX_PLANS = 64
# Of q, k_cache and block_table.
_NDIMS = [3, 4, 2]
_plans = _Plans()
os.register_at_fork(after_in_child=_forget)
