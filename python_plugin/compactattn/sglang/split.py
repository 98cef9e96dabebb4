"""The backend over an engine's own FlashAttention backend: a step is split once, each layer then follows the split.

A mixin: the engine's class stands behind it in the method resolution order, and does whatever is not ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ..serving import policy as shared
from ..serving.policy import Part, Policy
from ..serving.report import REPORT
from ..serving.service import Service, Shape, refusal, reserve
from ..serving.settings import Options
from . import facts, policy


@dataclass(frozen=True)
class Rows:
    """The requests of one part, as the library takes them, beside the engine's metadata cut down to them."""

    block_table: Any
    seq_lens: Any
    query_start_loc: Any


@dataclass(frozen=True)
class Piece:
    """A part of a step with one owner."""

    part: Part
    rows: Rows
    metadata: Any


@dataclass(frozen=True)
class Split:
    """The pieces of a step, and the engine's metadata they were cut from: with any other they are void."""

    metadata: Any
    pieces: list[Piece]


class SplitBackend:
    """Attention of prefill steps: pieces that are ours by the library, the others by the engine."""

    _split: Split | None = None

    def serve(self, runner: Any, chosen: Options) -> None:
        """Told once, after construction; without it everything is the engine's.

        Layers of a model that is loaded are looked at now: refusals are said, and the workspace made, before it serves.
        """
        self._runner, self._options = runner, chosen
        self._services: dict[Shape, Service] = {}
        self._bound: dict[Any, Service | None] = {}
        self._refused: set[tuple[int, str]] = set()
        self._max_tokens = facts.max_step_tokens(runner)
        unknown = chosen.unknown_layers(runner.model_config.num_hidden_layers)
        if unknown:
            REPORT.warn(unknown)
        for layer in facts.layers_of(runner):
            self._bind(layer, at_start=True)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """The engine's, and the split of this step."""
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        self._split = self._split_of(forward_batch)
        # This step counted: behind the last one of a burst there may come no other for long.
        REPORT.write()

    def init_forward_metadata_out_graph(self, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
        """The engine's: what a graph holds is its work alone."""
        self._split = None
        super().init_forward_metadata_out_graph(forward_batch, *args, **kwargs)  # type: ignore[misc]

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        """The engine's; in split steps, of each piece by its owner, straight into its rows of the output."""
        service = self._service(layer, kwargs)
        if service is None or self._split is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)  # type: ignore[misc]
        if k is not None and save_kv_cache:
            self._write_kv(k, v, layer, forward_batch)
        heads, head_dim = layer.tp_q_head_num, layer.head_dim
        query = q.reshape(-1, heads, head_dim)
        out = getattr(forward_batch, "_attn_output", None)
        out = query.new_empty(query.shape) if out is None else out.view(-1, heads, head_dim)
        page_size = self._runner.page_size
        keys, values = (
            kv_pages(cache, page_size) for cache in self._runner.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        for piece in self._split.pieces:
            rows = piece.part.tokens
            if piece.part.ours:
                own = self._options.layers.get(layer.layer_id)
                service.attend(query[rows], (keys, values), piece.rows, out[rows], own)
            else:
                self._engine_piece(piece, query[rows], out[rows], layer, forward_batch)
        return out.view(-1, heads * head_dim)

    def _engine_piece(self, piece: Piece, query: Any, out: Any, layer: Any, forward_batch: Any) -> None:
        """The engine's attention of one piece; its KV is written already."""
        view = copy.copy(forward_batch)
        view._attn_output, view.batch_size = out, piece.rows.seq_lens.shape[0]
        whole, self.forward_metadata = self.forward_metadata, piece.metadata
        try:
            got = super().forward_extend(query, None, None, layer, view, False)  # type: ignore[misc]
        finally:
            self.forward_metadata = whole
        if got.data_ptr() != out.data_ptr():
            out.copy_(got.view(out.shape))

    def _write_kv(self, k: Any, v: Any, layer: Any, forward_batch: Any) -> None:
        """As the engine's forward_extend does it first."""
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        window = getattr(self.forward_metadata, "swa_out_cache_loc", None)
        # Named constructors are of newer versions; both take the step's slots.
        if hasattr(KVWriteLoc, "for_layer"):
            slots = KVWriteLoc.for_layer(forward_batch, layer, swa_loc=window)
        else:
            slots = KVWriteLoc(forward_batch.out_cache_loc, window)
        self._runner.token_to_kv_pool.set_kv_buffer(layer, slots, k, v, layer.k_scale, layer.v_scale)

    def _service(self, layer: Any, extra: dict[str, Any]) -> Service | None:
        """Who serves this call; None = the engine."""
        split = self._split
        if split is None or split.metadata is not self.forward_metadata:
            return None
        unknown = [name for name, value in extra.items() if value is not None and value is not False]
        if unknown:
            REPORT.fallback(f"layer called with {', '.join(unknown)}")
            return None
        return self._bind(layer)

    def _bind(self, layer: Any, *, at_start: bool = False) -> Service | None:
        """Who serves the layer, in any step; None = the engine."""
        if self._options.keeps_dense(layer.layer_id, self._runner.model_config.num_hidden_layers):
            return None
        refused = policy.layer_refusal(layer)
        if refused:
            self._refuse(layer, refused)
            return None
        key = (layer.layer_id, layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim, layer.scaling)
        if key not in self._bound:
            self._bound[key] = self._plan(layer, at_start)
        return self._bound[key]

    def _plan(self, layer: Any, at_start: bool) -> Service | None:
        shape, page_size = facts.shape_of(self._runner, layer, self._options.policy), self._runner.page_size
        refused = refusal(shape, page_size, self._options, layer.layer_id)
        if refused:
            self._refuse(layer, refused)
            return None
        if at_start:
            reserve(shape, self._options, page_size)
        if shape not in self._services:
            self._services[shape] = Service(shape, page_size, self._options)
        return self._services[shape]

    def _refuse(self, layer: Any, reason: str) -> None:
        """Counts a layer that is the engine's, once and not at every step."""
        if (layer.layer_id, reason) not in self._refused:
            self._refused.add((layer.layer_id, reason))
            REPORT.fallback(f"layer: {reason}")

    def _split_of(self, forward_batch: Any) -> Split | None:
        step, metadata = policy.step_of(forward_batch), self.forward_metadata
        chosen: Policy = self._options.policy
        if step is None or max(step.kv_lens) < chosen.min_kv_tokens or _capturing():
            return None
        refused = policy.metadata_refusal(metadata)
        if not refused and step.starts[-1] > self._max_tokens:
            refused = f"step of {step.starts[-1]} tokens: the plan is for {self._max_tokens}"
        if refused:
            REPORT.fallback(refused)
            return None
        left_out = shared.reasons(chosen, step)
        parts = shared.parts(step, left_out)
        REPORT.step(left_out, parts)
        if not any(part.ours for part in parts):
            return None
        return Split(metadata, [_cut(metadata, part) for part in parts])

    # The engine's own, set anew for each step.
    forward_metadata: Any = None


def kv_pages(cache: Any, page_size: int) -> Any:
    """``[num_pages, page_size, num_kv_heads, head_dim]`` of the engine's pool of one layer, as a view.

    The pool is ``[slots, heads, head_dim]``, a page's slots being neighbours, or, where the engine was told to keep
    heads outside, ``[num_pages, heads, page_size, head_dim]``.
    """
    return cache.transpose(1, 2) if cache.dim() == 4 else cache.unflatten(0, (-1, page_size))


def _cut(metadata: Any, part: Part) -> Piece:
    """The engine's metadata for the requests of one part. On the device: nothing is read back."""
    cut, reqs = copy.copy(metadata), part.reqs
    ends = slice(reqs.start, reqs.stop + 1)
    own = metadata.cu_seqlens_q[ends]
    cut.cu_seqlens_q = own - part.tokens.start if part.tokens.start else own
    keys = metadata.cu_seqlens_k[ends]
    cut.cu_seqlens_k = keys - keys[:1] if reqs.start else keys
    cut.cache_seqlens_int32, cut.page_table = metadata.cache_seqlens_int32[reqs], metadata.page_table[reqs]
    cut.max_seq_len_q, cut.max_seq_len_k = part.max_q_len, part.max_kv_len
    # A schedule made ahead is for the whole step; without one the engine's kernel schedules by itself.
    cut.scheduler_metadata = None
    return Piece(part, Rows(cut.page_table, cut.cache_seqlens_int32, cut.cu_seqlens_q), cut)


def _capturing() -> bool:
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
