"""The stages one by one, for engines that want tables, or attention over tables of their own.

Without ``out`` a stage writes to new memory beside the batch: the package's own on the CPU, torch's on CUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int64
from typing import Any

from . import _abi_step
from ._abi import Dtype, Which
from ._library import call
from .arrays import Array
from .batch import Batch
from .errors import E_VALUE, invalid
from .home import Home
from .plan import Plan
from .selection import Csr, Lists, Padded, Selection, Summaries, Table
from .settings import int32
from .tensors import none, view
from .workspace import Scratch


def update_summaries(
    plan: Plan,
    batch: Batch,
    summaries: Summaries,
    *,
    layer: int = 0,
    which: str = "completed",
    stream: int | None = None,
) -> None:
    """Writes block means: of the blocks this step's tokens complete (``completed``), or of ``all`` whole blocks."""
    if which.upper() not in Which.__members__:
        raise invalid(E_VALUE, "which", "completed|all", repr(which))
    struct, _ = _placed(plan, batch, stream, layer, works=False)
    where = (plan.handle, int32("layer", layer), byref(struct))
    call("compactattn_summaries_update", *where, Which[which.upper()], summaries.for_writing())


def select(
    plan: Plan,
    batch: Batch,
    *,
    layer: int = 0,
    summaries: Summaries | None = None,
    out: Selection | None = None,
    stream: int | None = None,
) -> Selection:
    """Scores every past block; keeps blocks row by row into masks.

    ``summaries``: None = block means are made anew in this call where the selector reads them.
    Scores of the open region, and of requests that are dense by policy, stay as they were (0 in fresh memory).
    """
    if out is None:
        sizes, heads = plan.sizes(layer), plan.desc.num_q_heads
        scores = batch.home.zeros("selection.scores", (sizes.select_rows, heads, sizes.max_blocks), Dtype.F32, stream)
        masks = batch.home.zeros("selection.masks", (sizes.select_rows, heads, sizes.mask_words), Dtype.U32, stream)
        out = Selection(scores, masks)
    means = _means(plan, batch, (layer, stream), summaries)
    struct, _memory = _placed(plan, batch, stream, layer)
    call(
        "compactattn_select",
        plan.handle,
        int32("layer", layer),
        byref(struct),
        means.for_step() if means else None,
        out.for_writing(),
    )
    return out


def union(
    plan: Plan, batch: Batch, selection: Selection, *, layer: int = 0, out: Any = None, stream: int | None = None
) -> Lists:
    """Unites scores (or, without them, masks) of the rows that share a list, the way the layer's settings say.

    On CUDA, where lengths are on the device, ``rows`` is the most that such a batch can have.
    """
    sizes = plan.sizes(layer)
    bits = batch.home.zeros("lists", (sizes.list_rows, sizes.mask_words), Dtype.U32, stream) if out is None else out
    # The library takes one of the two; from scores it goes the layer's own way.
    one = selection if selection.scores is None else Selection(scores=selection.scores)
    tensor, rows = view("lists", bits, writable=True).tensor, c_int64()
    struct, _memory = _placed(plan, batch, stream, layer)
    where = (plan.handle, int32("layer", layer), byref(struct), byref(one.struct))
    call("compactattn_union", *where, byref(tensor), byref(rows))
    return Lists(_head(bits, rows.value) if out is None else bits, rows.value)


def table(
    plan: Plan,
    batch: Batch,
    lists: Lists,
    *,
    layer: int = 0,
    out: Table | None = None,
    stream: int | None = None,
) -> Table:
    """Turns lists into rows of physical boxes, past boxes ascending, the open region last."""
    if out is None:
        ints, rows = _ints_of(batch, stream), lists.rows
        out = Table(ints(rows), ints(rows), ints(rows, plan.sizes(layer).max_boxes))
    _on_lists("compactattn_table_build", plan, batch, lists, (layer, stream), out.for_writing())
    return out


def export_padded(
    plan: Plan,
    batch: Batch,
    lists: Lists,
    *,
    layer: int = 0,
    out: Padded | None = None,
    stream: int | None = None,
) -> Padded:
    """Whole engine pages as FlashAttention takes them: every page with a selected token, ascending, chunk last.

    On CUDA nothing is read back: rows that the batch could have had but has not are empty.
    """
    if out is None:
        ints, rows = _ints_of(batch, stream), lists.rows
        out = Padded(ints(rows), ints(rows), ints(rows, batch.block_table.shape[1]))
    _on_lists("compactattn_table_export_padded", plan, batch, lists, (layer, stream), out.for_writing())
    return out


def export_csr(
    plan: Plan,
    batch: Batch,
    lists: Lists,
    *,
    layer: int = 0,
    out: Csr | None = None,
    stream: int | None = None,
) -> Csr:
    """Whole engine pages as FlashInfer takes them; ``indices`` is cut to the entries written unless given.

    On CUDA, where nothing is read back, to those that such a batch can have at most; ``indptr`` says which are used.
    """
    entries, given = c_int64(), out
    if out is None:
        ints, rows = _ints_of(batch, stream), lists.rows
        out = Csr(ints(rows + 1), ints(rows * batch.block_table.shape[1]), ints(rows))
    _on_lists(
        "compactattn_table_export_csr",
        plan,
        batch,
        lists,
        (layer, stream),
        out.for_writing(),
        byref(entries),
    )
    return out if given else Csr(out.indptr, _head(out.indices, entries.value), out.last_page_len)


def attend(
    plan: Plan,
    batch: Batch,
    rows: Table,
    out: Any,
    lse: Any = None,
    *,
    layer: int = 0,
    correction: tuple[Lists, Summaries] | None = None,
    scratch: Scratch | None = None,
    stream: int | None = None,
) -> None:
    """Attends each query to the boxes of its rows; ``correction`` adds the mean of what those lists skip."""
    args = _abi_step.AttendArgs(layer=int32("layer", layer), batch=ctypes.pointer(batch.struct))
    args.table = ctypes.pointer(rows.struct)
    args.out = view("out", out, writable=True).tensor
    args.lse = none() if lse is None else view("lse", lse, writable=True).tensor
    if correction is not None:
        args.lists = ctypes.pointer(view("lists", correction[0].bits).tensor)
        args.summaries = ctypes.pointer(correction[1].struct)
    args.stream = handle = batch.home.stream(stream)
    memory = scratch or plan.workspace(batch, handle, layer)
    args.workspace, args.workspace_bytes = memory.address, memory.num_bytes
    call("compactattn_attend", plan.handle, byref(args))


def combine(
    plan: Plan,
    a: tuple[Any, Any],
    b: tuple[Any, Any],
    out: Any,
    lse: Any = None,
    *,
    stream: int | None = None,
) -> None:
    """Merges two results ``(out, lse)`` of the same queries over disjoint KV, weighted by their lse."""
    given = {"out_a": a[0], "lse_a": a[1], "out_b": b[0], "lse_b": b[1]}
    views = {name: view(name, value) for name, value in given.items()}
    views["out"] = view("out", out, writable=True)
    if lse is not None:
        views["lse"] = view("lse", lse, writable=True)
    args = _abi_step.CombineArgs(**{name: view.tensor for name, view in views.items()})
    args.stream = Home.of((views["out"],), ("out",)).stream(stream)
    call("compactattn_combine", plan.handle, byref(args))


def _on_lists(function: str, plan: Plan, batch: Batch, lists: Lists, at: tuple[int, int | None], *outputs: Any) -> None:
    layer, stream = at
    tensor = view("lists", lists.bits).tensor
    struct, _memory = _placed(plan, batch, stream, layer)
    call(function, plan.handle, int32("layer", layer), byref(struct), byref(tensor), *outputs)


def _placed(
    plan: Plan, batch: Batch, stream: int | None, layer: int, *, works: bool = True
) -> tuple[_abi_step.Batch, Scratch | None]:
    """The batch for a stage called by itself: on CUDA with stream and, if it ``works`` in one, a workspace.

    The second is what the first points to.
    """
    if batch.home.on_cpu:
        return batch.struct, None
    struct = _abi_step.Batch.from_buffer_copy(batch.struct)
    struct.stream = handle = batch.home.stream(stream)
    memory = plan.workspace(batch, handle, layer) if works else None
    if memory:
        struct.workspace, struct.workspace_bytes = memory.address, memory.num_bytes
    return struct, memory


def _means(plan: Plan, batch: Batch, at: tuple[int, int | None], given: Summaries | None) -> Summaries | None:
    layer, stream = at
    settings = plan.settings(layer)
    if given or settings.selector not in READS_MEANS:
        return given
    made = Summaries.empty(plan, batch.k.shape[0], layer=layer, seals=False, home=batch.home, stream=stream)
    update_summaries(plan, batch, made, layer=layer, which="all", stream=stream)
    return made


def _ints_of(batch: Batch, stream: int | None) -> Callable[..., Any]:
    return lambda *shape: batch.home.zeros("out", shape, Dtype.I32, stream)


def _head(rows: Any, count: int) -> Any:
    """The first rows, in the same memory."""
    return rows.head(count) if isinstance(rows, Array) else rows[:count]


# The library refuses the others by name, should this set fall behind.
READS_MEANS = {"flashprefill", "pooled_mass", "two_level"}
