"""Builder and implementation over an engine's own: the step is split once, each layer then follows the split.

Mixins: the engine's class stands behind them in the method resolution order, and does whatever is not ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from ..serving import policy
from ..serving.policy import Part, Step
from ..serving.report import REPORT
from ..serving.service import Call, Service, Shape, kv_views, layer_number, refusal, reserve, seen
from ..tensors import e4m3
from . import current


@dataclass(frozen=True)
class Piece:
    """A part of a step and the engine's metadata cut down to it."""

    part: Part
    metadata: Any
    # What the library was given for it, by service: made by the step's first layer, for all of them.
    calls: dict[Service, Call] = field(default_factory=dict)


class SplitBuilder:
    """Metadata builder: the engine's metadata, with the pieces beside it in steps that are split."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        options = self._options = current.options(vllm_config)
        self._policy = replace(
            options.policy, min_chunk_tokens=max(options.policy.min_chunk_tokens, _longest_decode(vllm_config) + 1)
        )
        context = vllm_config.compilation_config.static_forward_context
        unknown = options.unknown_layers(current.num_layers(vllm_config))
        if unknown:
            REPORT.warn(unknown)
        served = [] if options.is_dense else [n for n in layer_names if context[n].impl.bind(n, kv_cache_spec)]
        self._serves = bool(served)
        if self._serves:
            # The older model runner then puts decodes first, as the newer one does by itself.
            self.reorder_batch_threshold = 1
            import torch

            # Each piece may need first tokens counted from itself: one more entry than it has requests.
            entries = 2 * vllm_config.scheduler_config.max_num_seqs + 2
            self._starts = torch.empty(entries, dtype=torch.int32, device=device)
        REPORT.start(current.start_line(options, self._policy, f"{len(served)} of {len(layer_names)}", kv_cache_spec))

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The engine's metadata; ``compact_pieces`` of it are set where some request is ours."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.compact_pieces = None
        # Most steps are all decode, and leave here; captured graphs and drafts hold the engine's work alone.
        long = common_attn_metadata.max_query_len >= self._policy.min_chunk_tokens
        if self._serves and long and not self._capturing and not fast_build:
            metadata.compact_pieces = self._pieces(metadata, common_attn_metadata, common_prefix_len > 0)
        # This step counted: behind the last one of a burst there may come no other for long.
        REPORT.write()
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """The engine's, never split."""
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._capturing = False

    def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any) -> Any:
        """The same step for another KV group."""
        made = super().update_block_table(metadata, blk_table, slot_mapping)  # type: ignore[misc]
        if made.compact_pieces is not None:
            made.compact_pieces = [_with_table(piece, blk_table) for piece in made.compact_pieces]
        return made

    def _pieces(self, metadata: Any, common: Any, cascade: bool) -> list[Piece] | None:
        refused = policy.step_refusal(common, cascade=cascade)
        if refused:
            REPORT.fallback(refused)
            return None
        step = Step.of(common)
        left_out = policy.reasons(self._policy, step)
        parts = policy.parts(step, left_out)
        REPORT.step(left_out, parts)
        if not any(part.ours for part in parts):
            return None
        used, pieces = 0, []
        for part in parts:
            count = part.reqs.stop - part.reqs.start + 1
            pieces.append(_cut(metadata, part, self._starts[used : used + count]))
            used += count
        return pieces

    _capturing = False


class SplitImpl:
    """Attention of one layer: pieces that are ours by the library, the others by :meth:`engine_piece`."""

    # Where K and V lie, set by the backend; see kv_views.
    kv_axis: int | None = None
    _reserved = False
    _where: tuple[Any, ...] | None = None
    _seen: tuple[Any, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = current.config()
        self._options = current.options(vllm_config)
        self._limits = None if self._options.is_dense else current.limits(vllm_config)
        self._service: Service | None = None
        self._layer = -1
        self._off = current.layer_refusal(self)
        self._is_fp8 = self.kv_cache_dtype in current.FP8  # type: ignore[attr-defined]
        self._dtype = "" if self._options.is_dense else current.model_dtype(vllm_config)

    def bind(self, name: str, spec: Any) -> bool:
        """Told by the builder, once pages are known: whether this layer is served."""
        self._layer = layer_number(name)
        if self._off is None and self._options.keeps_dense(self._layer, self._limits.num_layers):  # type: ignore[union-attr]
            return False
        # A cache of fp8 is one of bytes, to the engine.
        shape = self._shape(self._dtype if self._is_fp8 else current.dtype_name(spec.dtype))
        self._off = self._off or refusal(shape, spec.block_size, self._options, self._layer)
        if self._off is not None:
            REPORT.fallback(f"layer: {self._off}")
            return False
        self._service = current.service(shape, spec.block_size, self._options)
        return True

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The engine's forward; in split steps, of each piece by its owner, straight into its rows of ``output``."""
        if attn_metadata is None:
            self._reserve(query)
        pieces = getattr(attn_metadata, "compact_pieces", None)
        if pieces is None or self._service is None:
            return self.engine_step(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if any(given is not None for given in (*args, *kwargs.values())):
            raise NotImplementedError("compactattn: fused output quantization is not offered")
        for piece in pieces:
            rows = piece.part.tokens
            if piece.part.ours:
                self._attend(layer, piece, query[rows], kv_cache, output[rows])
            else:
                new = [None if tensor is None else tensor[rows] for tensor in (key, value)]
                self.engine_step(layer, query[rows], *new, kv_cache, piece.metadata, output[rows])
        return output

    def _attend(self, layer: Any, piece: Piece, query: Any, kv_cache: Any, output: Any) -> None:
        service: Service = self._service  # type: ignore[assignment]
        out = output.view(-1, self.num_heads, self.head_size)  # type: ignore[attr-defined]
        if self._is_fp8:
            query = current.plain_query(query, layer, out)
        call = piece.calls.get(service)
        if call is None or not call.fits(query, out):
            call = piece.calls[service] = service.call(query, self._views(kv_cache), piece.metadata, out)
        call.run(query, self._cache(kv_cache, layer), out, service.own(self._layer))

    def _cache(self, kv_cache: Any, layer: Any) -> tuple[Any, ...]:
        """The layer's cache as the library sees it, looked at once for as long as it lies where it does."""
        scales = (layer._k_scale, layer._v_scale) if self._is_fp8 else ()
        where = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride(), *(scale.data_ptr() for scale in scales))
        if where != self._where:
            self._where, self._seen = where, seen(self._views(kv_cache), scales)
        return self._seen

    def _views(self, kv_cache: Any) -> tuple[Any, Any]:
        keys, values = kv_views(kv_cache, self.head_size, self.kv_axis)  # type: ignore[attr-defined]
        return (e4m3(keys), e4m3(values)) if self._is_fp8 else (keys, values)

    def engine_step(self, *args: Any, **kwargs: Any) -> Any:
        """Attention as the engine does it, of a whole step or a piece; arguments as forward's."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _reserve(self, query: Any) -> None:
        # The engine's profiling run, the last moment to allocate; what cannot be served is found out by bind.
        if self._reserved or self._off is not None or self._options.is_dense:
            return
        self._reserved = True
        shape = self._shape(self._dtype if self._is_fp8 else current.dtype_name(query.dtype))
        if refusal(shape, policy.PAGE_SIZES[0], self._options) is None:
            reserve(shape, self._options)

    def _shape(self, dtype: str) -> Shape:
        limits = self._limits
        return Shape(
            num_q_heads=self.num_heads,  # type: ignore[attr-defined]
            num_kv_heads=self.num_kv_heads,  # type: ignore[attr-defined]
            head_dim=self.head_size,  # type: ignore[attr-defined]
            sm_scale=self.scale,  # type: ignore[attr-defined]
            dtype=dtype,
            kv_dtype="e4m3" if self._is_fp8 else None,
            device=limits.device,  # type: ignore[union-attr]
            max_num_reqs=limits.max_num_reqs,  # type: ignore[union-attr]
            max_total_q=limits.max_total_q,  # type: ignore[union-attr]
            max_kv_len=limits.max_kv_len,  # type: ignore[union-attr]
            num_splits=limits.num_splits,  # type: ignore[union-attr]
        )


def _cut(metadata: Any, part: Part, starts: Any) -> Piece:
    """The engine's metadata for the requests of one part; ``starts`` is memory for their first tokens."""
    import torch

    cut, reqs = copy.copy(metadata), part.reqs
    own = metadata.query_start_loc[reqs.start : reqs.stop + 1]
    # On the device: the host knows by how much, and nothing is read back.
    cut.query_start_loc = torch.sub(own, part.tokens.start, out=starts) if part.tokens.start else own
    cut.num_actual_tokens = part.tokens.stop - part.tokens.start
    cut.max_query_len, cut.max_seq_len = part.max_q_len, part.max_kv_len
    cut.seq_lens, cut.block_table = metadata.seq_lens[reqs], metadata.block_table[reqs]
    cut.slot_mapping = metadata.slot_mapping[part.tokens]
    # A schedule made ahead is for the whole step; without one the engine's kernel schedules by itself.
    cut.scheduler_metadata = cut.compact_pieces = None
    return Piece(part, cut)


def _with_table(piece: Piece, block_table: Any) -> Piece:
    cut = copy.copy(piece.metadata)
    cut.block_table = block_table[piece.part.reqs]
    return Piece(piece.part, cut)


def _longest_decode(vllm_config: Any) -> int:
    """Query tokens that a decode may have: captured graphs hold such steps, and they stay the engine's."""
    speculative = getattr(vllm_config, "speculative_config", None)
    drafted = getattr(speculative, "num_speculative_tokens", None) or 0
    return 1 + 2 * int(drafted)


# Methods of the engine's classes that ours override or that its engine calls, and the arguments they are called with;
# None = only that there is one. A bound one counts without its class.
IMPL_HOOKS: dict[str, int | None] = {"forward": 8}
BUILDER_HOOKS: dict[str, int | None] = {
    "__init__": 5,
    "build": 4,
    "build_for_cudagraph_capture": 2,
    "update_block_table": 4,
}
BACKEND_HOOKS: dict[str, int | None] = {
    "get_name": 0,
    "get_impl_cls": 0,
    "get_builder_cls": 0,
    "get_supported_kernel_block_sizes": None,
    "validate_configuration": None,
}
