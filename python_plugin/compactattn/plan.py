"""Plan: shapes and settings of one model on one rank, checked once; and its forward pass."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from . import _abi, _abi_step, context, workspace
from ._library import call, load
from ._stats import Stats
from .batch import Batch
from .errors import E_DTYPE, E_VALUE, invalid
from .selection import Selection, Summaries
from .settings import Settings, int32, whole
from .tensors import view
from .workspace import Borrowed, Scratch


@dataclass(frozen=True)
class PlanDesc:
    """What a plan is made from; fields as in ``compactattn_plan_desc``."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    # Tokens per KV page of the engine.
    page_size: int
    # bf16, f16 or f32.
    dtype: str
    # The largest step: requests, query tokens over all of them, KV tokens of one.
    max_num_reqs: int
    max_total_q: int
    max_kv_len: int
    # Of the KV cache: None = dtype, or e4m3.
    kv_dtype: str | None = None
    # None = 1 / sqrt(head_dim).
    sm_scale: float | None = None
    # None = mode compactattn.
    settings: Settings | None = None
    num_layers: int = 1
    # Settings of single layers: num_layers entries, None = settings.
    layer_settings: tuple[Settings | None, ...] = ()
    # KV splits of every list, 1..64 (CUDA: 1). 0: 1 on the CPU, and on CUDA equal shares for all processors, with which
    # the last bits of a result may depend on the rest of the batch.
    num_splits: int = 0
    # Safetensors file with the weights of selector attn_gate.
    gate_weights_path: str | None = None
    rope_inv_freq: tuple[float, ...] = ()
    rope_interleaved: bool = False
    # Model features that are refused by name, so that an engine learns of it at start.
    sliding_window: int = 0
    logits_soft_cap: float = 0.0
    attention_sinks: bool = False
    alibi: bool = False

    def to_c(self) -> _abi.PlanDesc:
        """The C struct; it keeps alive what it points to."""
        kv_dtype = 0 if self.kv_dtype is None else _dtype(self.kv_dtype, "kv_dtype", _KV_DTYPES)
        struct = _abi.PlanDesc(dtype=_dtype(self.dtype), kv_dtype=kv_dtype, sm_scale=self._sm_scale())
        for name in _INTS:
            setattr(struct, name, int32(name, getattr(self, name)))
        struct.max_total_q = whole("max_total_q", self.max_total_q, 63)
        struct.max_kv_len = whole("max_kv_len", self.max_kv_len, 63)
        struct.logits_soft_cap = self.logits_soft_cap
        if self.settings is not None:
            struct.settings = ctypes.pointer(self.settings.to_c())
        if self.layer_settings:
            struct.layer_settings = self._layers()
        if self.gate_weights_path is not None:
            struct.gate_weights_path = self.gate_weights_path.encode()
        if self.rope_inv_freq:
            struct.rope_inv_freq = (ctypes.c_float * len(self.rope_inv_freq))(*self.rope_inv_freq)
            struct.rope_inv_freq_len = len(self.rope_inv_freq)
        return struct

    def _sm_scale(self) -> float:
        # 0 means the default in C; asked for by a caller it is a mistake.
        if self.sm_scale == 0:
            raise invalid(E_VALUE, "sm_scale", "finite and > 0", self.sm_scale)
        return self.sm_scale or 0.0

    def _layers(self) -> Any:
        if len(self.layer_settings) != self.num_layers:
            wanted = f"num_layers ({self.num_layers}) entries"
            raise invalid(E_VALUE, "layer_settings", wanted, len(self.layer_settings))
        # An entry that is not set stays NULL: the plan's own settings.
        pointers = (ctypes.POINTER(_abi.Settings) * self.num_layers)()
        for i, settings in enumerate(self.layer_settings):
            if settings is not None:
                pointers[i] = ctypes.pointer(settings.to_c())
        return pointers


class Plan:
    """Immutable; any number of threads may use it at once. Freed with its last reference.

    Raises InvalidArgument (Unsupported where the shape is well formed but not offered) naming the field.
    """

    def __init__(self, desc: PlanDesc, on: context.Context | None = None) -> None:
        self.desc = desc
        self.context = on or context.default()
        handle = c_void_p()
        call("compactattn_plan_create", self.context.handle, byref(desc.to_c()), byref(handle))
        self.handle = handle.value
        self._bytes: dict[tuple[int, Settings | None], int] = {}
        # CUDA only: by thread and stream. Streams overlap; threads launch without the GIL, so kernels may alternate.
        self._scratch: dict[tuple[int, int | None], Borrowed] = {}
        context.free_with(self, "compactattn_plan_destroy", self.handle)

    @staticmethod
    def supports(desc: PlanDesc, on: context.Context | None = None) -> str | None:
        """Why the plan could not be made, or None if it could: for engines, to fall back before anything runs."""
        reason = ctypes.create_string_buffer(512)
        handle = (on or context.default()).handle
        load().compactattn_supports(handle, byref(desc.to_c()), reason, len(reason))
        return reason.value.decode() or None

    def sizes(self, layer: int = 0, settings: Settings | None = None) -> _abi_step.Sizes:
        """How large the buffers of the layer's largest step are: the fields of ``compactattn_sizes``."""
        sizes = _abi_step.Sizes()
        own = byref(settings.to_c()) if settings else None
        call("compactattn_plan_sizes", self.handle, int32("layer", layer), own, byref(sizes))
        return sizes

    def stats(self, layer: int = -1) -> Stats:
        """What one layer (-1 = all) has selected."""
        stats = _abi_step.Stats()
        call("compactattn_plan_stats", self.handle, int32("layer", layer), byref(stats))
        return Stats.from_c(stats)

    def settings(self, layer: int = 0) -> Settings:
        """The layer's settings."""
        own = self.desc.layer_settings[layer] if self.desc.layer_settings else None
        return own or self.desc.settings or Settings.mode("compactattn")

    def summary_bytes(self, num_pages: int, layer: int = 0) -> int:
        """Bytes of k_mean (and as many of v_mean) for a pool of ``num_pages``."""
        num_bytes = c_int64()
        pages = whole("num_pages", num_pages, 63)
        call("compactattn_summary_bytes", self.handle, int32("layer", layer), pages, byref(num_bytes))
        return num_bytes.value

    def forward(
        self,
        batch: Batch,
        out: Any,
        lse: Any = None,
        *,
        layer: int = 0,
        settings: Settings | None = None,
        summaries: Summaries | None = None,
        external: Selection | None = None,
        scratch: Scratch | None = None,
        stream: int | None = None,
    ) -> None:
        """select, union, table, attend, combine of one layer into ``out`` (as q) and ``lse [num_q_heads, total_q]``.

        ``lse`` is f32, natural logarithm. ``scratch``: workspace of this call alone; None = this thread's, on CUDA the
        plan's own for it and that stream. ``stream``: cudaStream_t; None = torch's current one. On any exception
        nothing was written.
        """
        args = self.arguments(
            batch,
            out,
            lse,
            layer=layer,
            settings=settings,
            summaries=summaries,
            external=external,
            scratch=scratch,
            stream=stream,
        )
        self.run(args)

    def run(self, args: _abi_step.ForwardArgs) -> None:
        """The forward that :meth:`arguments` has made; they may be run again, with other addresses in them."""
        call("compactattn_forward", self.handle, byref(args))

    def arguments(
        self,
        batch: Batch,
        out: Any,
        lse: Any = None,
        *,
        layer: int = 0,
        settings: Settings | None = None,
        summaries: Summaries | None = None,
        external: Selection | None = None,
        scratch: Scratch | None = None,
        stream: int | None = None,
    ) -> _abi_step.ForwardArgs:
        """The C struct of a :meth:`forward`; the caller keeps tensors and ``scratch`` alive as long as it runs it."""
        args = _abi_step.ForwardArgs()
        args.layer, args.batch = int32("layer", layer), ctypes.pointer(batch.struct)
        args.out = view("out", out, writable=True).tensor
        if lse is not None:
            args.lse = view("lse", lse, writable=True).tensor
        if settings is not None:
            args.settings = ctypes.pointer(settings.to_c())
        if summaries is not None:
            args.summaries = summaries.for_step()
        if external is not None:
            args.external = ctypes.pointer(external.struct)
        # A field of the struct would read back NULL, the default stream, as None.
        args.stream = handle = batch.home.stream(stream)
        memory = scratch or self.workspace(batch, handle, layer, settings)
        args.workspace, args.workspace_bytes = memory.address, memory.num_bytes
        return args

    def workspace(self, batch: Batch, stream: int | None, layer: int = 0, settings: Settings | None = None) -> Scratch:
        """Scratch memory where the batch lives: this thread's, on CUDA the plan's own for this thread and ``stream``.

        On CUDA it is allocated once, and stays alive with the plan; a graph captured on a stream goes on using it.
        """
        num_bytes = self._workspace_bytes(layer, settings)
        if batch.home.on_cpu:
            return workspace.of_thread(num_bytes)
        key = threading.get_ident(), stream
        found = self._scratch.get(key)
        if found is None or found.num_bytes < num_bytes:
            words = batch.home.empty("workspace", (-(-num_bytes // 4),), _abi.Dtype.I32, stream)
            found = self._scratch[key] = Borrowed(words)
        return found

    def _workspace_bytes(self, layer: int, settings: Settings | None) -> int:
        # Threads may both ask and both write the same number.
        if (layer, settings) not in self._bytes:
            self._bytes[layer, settings] = self.sizes(layer, settings).workspace_bytes
        return self._bytes[layer, settings]


_DTYPES = {"bf16": _abi.Dtype.BF16, "f16": _abi.Dtype.F16, "f32": _abi.Dtype.F32}
_KV_DTYPES = {**_DTYPES, "e4m3": _abi.Dtype.E4M3}


def _dtype(name: str, what: str = "dtype", among: dict[str, _abi.Dtype] = _DTYPES) -> _abi.Dtype:
    found = among.get(name)
    if found is None:
        *first, last = among
        raise invalid(E_DTYPE, what, f"{', '.join(first)} or {last}", repr(name))
    return found


# Of PlanDesc, as the C struct has them.
_INTS = ["num_q_heads", "num_kv_heads", "head_dim", "page_size", "max_num_reqs", "num_layers", "num_splits"]
_INTS += ["rope_interleaved", "sliding_window", "attention_sinks", "alibi"]
