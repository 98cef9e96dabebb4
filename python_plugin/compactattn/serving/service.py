"""The library for one kind of layer: its plan, the one workspace of the process, and the call itself."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from .. import context, workspace
from ..batch import Batch
from ..errors import CompactAttnError
from ..plan import Plan, PlanDesc
from ..settings import Settings
from ..tensors import none, view
from ..workspace import Borrowed, Scratch
from .policy import PAGE_SIZES
from .report import REPORT
from .settings import Options


@dataclass(frozen=True)
class Shape:
    """What layers must have in common to share a plan, and the engine's limits."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    # bf16, f16 or f32.
    dtype: str
    # cpu or cuda:N.
    device: str
    max_num_reqs: int
    max_total_q: int
    max_kv_len: int
    # Of the KV cache, where it is not dtype: e4m3.
    kv_dtype: str | None = None
    # Under the engine's batch invariance 1: results then depend on no neighbour, by no bit.
    num_splits: int = 0

    def desc(self, page_size: int, settings: Settings) -> PlanDesc:
        """The plan's description for pages of this size."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "device"}
        return PlanDesc(**fields, page_size=page_size, settings=settings)


class Service:
    """One plan, with the settings of the layers that differ."""

    def __init__(self, shape: Shape, page_size: int, options: Options) -> None:
        self.shape, self.page_size = shape, page_size
        # As the library wants them, for layers that differ from the plan's.
        self._own = {layer: ctypes.pointer(settings.to_c()) for layer, settings in options.layers.items()}
        self._plan = Plan(shape.desc(page_size, options.settings), context.of(shape.device))
        # Any layer's settings: a call is made once for all of them.
        self._num_bytes = _workspace_bytes(shape, page_size, options)
        if reserve(shape, options, page_size):
            REPORT.warn("workspace made after the engine had measured its memory, which did not count it")
        REPORT.selected.append(self._selected)

    def attend(self, query: Any, kv: tuple[Any, Any], part: Any, out: Any, settings: Settings | None) -> None:
        """The requests of ``part`` (a slice of the engine's metadata), straight into ``out``, on the current stream."""
        batch = Batch.of(query, *kv, part.block_table, part.seq_lens, part.query_start_loc)
        self._plan.forward(batch, out, settings=settings, scratch=_workspaces.get(self.shape.device))

    def call(self, query: Any, kv: tuple[Any, Any], part: Any, out: Any) -> Call:
        """The same, made to be repeated for other layers of this step by :meth:`Call.run`."""
        batch = Batch.of(query, *kv, part.block_table, part.seq_lens, part.query_start_loc)
        memory = _workspaces.get(self.shape.device) or workspace.of_thread(self._num_bytes)
        args = self._plan.arguments(batch, out, scratch=memory)
        return Call(self._plan, batch, memory, args, (_layout(query), _layout(out)))

    def own(self, layer: int) -> Any:
        """Pointer to what the layer uses instead of the plan's settings; None = nothing."""
        return self._own.get(layer)

    def _selected(self) -> dict[str, Any]:
        stats = self._plan.stats()
        return {"page_size": self.page_size, "density": stats.density, "refused": stats.refused, "dense": stats.dense}


@dataclass(frozen=True)
class Call:
    """One step's requests as the library wants them: from layer to layer only addresses change.

    What else it points to is the engine's, which holds it for as long as the step runs.
    """

    _plan: Plan
    # Keeps lengths, tables and the struct alive.
    _batch: Batch
    # Held, for another call that needs more makes this thread let go of it.
    _memory: Scratch
    _args: Any
    _layouts: tuple[Any, Any]

    def fits(self, query: Any, out: Any) -> bool:
        """Whether a layer's rows lie as those it was made for."""
        return (_layout(query), _layout(out)) == self._layouts

    def run(self, query: Any, kv: tuple[Any, ...], out: Any, own: Any) -> None:
        """One layer: its rows, its cache as the library sees it (:func:`seen`), its settings or None."""
        args, struct = self._args, self._batch.struct
        struct.q.data = query.data_ptr()
        struct.k, struct.v, struct.k_scale, struct.v_scale = kv
        args.out.data, args.settings = out.data_ptr(), own
        self._plan.run(args)


def seen(kv: tuple[Any, ...], scales: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """Keys, values and their scales (f32, of an e4m3 cache alone) as the library's tensors.

    They hold no memory: the cache and its scales stay the engine's to free.
    """
    names = ("k_scale", "v_scale")
    found = [view(name, scale.reshape(-1)).tensor for name, scale in zip(names, scales, strict=False)]
    return view("k_cache", kv[0]).tensor, view("v_cache", kv[1]).tensor, *(found or (none(), none()))


def refusal(shape: Shape, page_size: int, options: Options, layer: int | None = None) -> str | None:
    """Why the library cannot serve the layer (None: those without settings of their own): its own words; None = it can.

    ValueError for what no library could: a mistake, and the engine is not to start.
    """
    if page_size not in PAGE_SIZES:
        return f"page size {page_size}: wanted one of {PAGE_SIZES}"
    # The plan is made with the general ones.
    needed = [options.settings] if layer is None else [options.settings, options.of_layer(layer)]
    return next((text for text in (_refused(shape, page_size, one) for one in needed) if text), None)


def reserve(shape: Shape, options: Options, page_size: int | None = None) -> bool:
    """Makes the workspace of the largest step, while the engine measures its memory; whether there was none so large.

    In vLLM that is the profiling run, where the page size is not settled: without one that of the hungriest is
    reserved. One workspace serves all layers of a process: they follow each other on the engine's one stream, launched
    by its one thread.
    """
    if shape.device == "cpu":
        return False
    needed = max(_workspace_bytes(shape, size, options) for size in ((page_size,) if page_size else PAGE_SIZES))
    held = _workspaces.get(shape.device)
    if held is not None and held.num_bytes >= needed:
        return False
    import torch

    words = torch.empty(-(-needed // 4), dtype=torch.int32, device=shape.device)
    _workspaces[shape.device] = Borrowed(words)
    return True


def kv_views(kv_cache: Any, head_dim: int, kv_axis: int | None = None) -> tuple[Any, Any]:
    """Keys and values ``[num_pages, page_size, num_kv_heads, head_dim]`` of the engine's cache, as views.

    Its logical shape, by version: ``[num_pages, heads, page_size, 2 * head_dim]`` (0.26 on), ``[num_pages, 2,
    page_size, heads, head_dim]`` (0.23-0.25), ``[2, num_pages, ...]`` (before); strides are the layout's own.
    ``kv_axis``: where the 2 is in the older ones, which a cache of 2 pages cannot tell.
    """
    if kv_cache.dim() == 4:
        if kv_cache.shape[-1] != 2 * head_dim:
            raise ValueError(f"compactattn: KV cache of {tuple(kv_cache.shape)}: wanted {2 * head_dim} last")
        joined = kv_cache.transpose(1, 2)
        return _canonical(joined[..., :head_dim]), _canonical(joined[..., head_dim:])
    axis = kv_axis if kv_axis is not None else (0 if kv_cache.shape[0] == 2 else 1)
    if kv_cache.dim() != 5 or kv_cache.shape[axis] != 2 or kv_cache.shape[-1] != head_dim:
        raise ValueError(f"compactattn: KV cache of {tuple(kv_cache.shape)}: not a layout that is known here")
    keys, values = kv_cache.unbind(axis)
    return _canonical(keys), _canonical(values)


def kv_axis_of(backend: Any, head_dim: int) -> int | None:
    """Where the engine's version keeps the 2 of K and V: None from the version on that joins them in the last axis."""
    pages = 1234567
    try:
        shape = backend.get_kv_cache_shape(pages, 16, 8, head_dim)
    except (AttributeError, NotImplementedError):
        return None
    return None if len(shape) != 5 else 1 - shape.index(pages)


def layer_number(name: str) -> int:
    """The layer's number in its name: ``model.layers.3.self_attn.attn`` is 3; -1 if it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else -1


def _layout(tensor: Any) -> tuple[Any, Any]:
    return tensor.shape, tensor.stride()


def _canonical(cache: Any) -> Any:
    # An axis of one element may have any stride; copy engines want one that is a multiple of 16 bytes.
    if 1 not in cache.shape[1:3]:
        return cache
    strides = list(cache.stride())
    for axis in (2, 1):
        if cache.shape[axis] == 1:
            strides[axis] = strides[axis + 1] * cache.shape[axis + 1]
    return cache.as_strided(cache.shape, strides)


@cache
def _refused(shape: Shape, page_size: int, settings: Settings) -> str | None:
    try:
        on = context.of(shape.device)
    except CompactAttnError as error:
        # No kernels in this build, or none for this GPU: dense by the engine, and said so.
        return str(error)
    text = Plan.supports(shape.desc(page_size, settings), on)
    if text and not text.startswith(_NOT_OFFERED):
        raise ValueError(f"compactattn: {text}")
    return text


@cache
def _sizes(shape: Shape, page_size: int, settings: Settings) -> int:
    found: int = Plan(shape.desc(page_size, settings), context.of(shape.device)).sizes().workspace_bytes
    return found


def _workspace_bytes(shape: Shape, page_size: int, options: Options) -> int:
    """For any layer that is served."""
    every = (options.settings, *options.layers.values())
    return max((_sizes(shape, page_size, one) for one in every if not _refused(shape, page_size, one)), default=0)


# What the library says of shapes, builds and GPUs that it has no kernels for; all else is somebody's mistake.
_NOT_OFFERED = ("E_UNSUPPORTED", "E_NOT_BUILT", "E_ARCH")

# By device, of an engine's one stream and one thread: what two threads launched could alternate on it (see Plan).
_workspaces: dict[str, Borrowed] = {}
