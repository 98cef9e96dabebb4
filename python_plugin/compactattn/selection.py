"""What passes between stages: block means, scores and masks, lists, tables. Memory is the package's or the caller's."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _abi_step
from ._abi import Dtype
from .home import CPU, Home
from .tensors import View, none, view

if TYPE_CHECKING:
    from .plan import Plan


class Tensors:
    """Tensors of one C struct, by field name; None = left out."""

    def __init__(self, struct: type[ctypes.Structure], what: str, tensors: dict[str, Any]) -> None:
        self._what, self._tensors = what, tensors
        # The views keep the caller's memory alive as long as the struct that points to it.
        self.views: dict[str, View] = self._look(writable=False)
        fields = {name: self.views[name].tensor if name in self.views else none() for name in tensors}
        self.struct = struct(**fields)

    def for_writing(self) -> Any:
        """A reference to the struct for a call that writes; InvalidArgument naming a read-only tensor."""
        self._look(writable=True)
        return ctypes.byref(self.struct)

    def _look(self, *, writable: bool) -> dict[str, View]:
        given = {name: value for name, value in self._tensors.items() if value is not None}
        return {name: view(f"{self._what}.{name}", value, writable=writable) for name, value in given.items()}


class Summaries(Tensors):
    """Mean key (and value) of every whole block, kept beside the pool.

    ``[num_pages, summary_slots_per_page, num_kv_heads, head_dim]`` f32, contiguous; ``v_mean`` for mean correction.
    ``seals`` (``[.., num_kv_heads, 2]`` u32, zeros at first) say of which keys each one is: with them every call that
    reads summaries first makes anew those whose keys have changed, so none is ever stale.
    """

    struct: _abi_step.Summaries

    def __init__(self, k_mean: Any, v_mean: Any = None, seals: Any = None) -> None:
        tensors = {"k_mean": k_mean, "v_mean": v_mean, "seals": seals}
        super().__init__(_abi_step.Summaries, "summaries", tensors)
        self.k_mean, self.v_mean, self.seals = k_mean, v_mean, seals

    @classmethod
    def empty(
        cls,
        plan: Plan,
        num_pages: int,
        *,
        layer: int = 0,
        values: bool = False,
        seals: bool = True,
        home: Home = CPU,
        stream: int | None = None,
    ) -> Summaries:
        """Zeroed memory for one layer of a pool of ``num_pages``; ``home``: a batch's, for memory beside its pool.

        ``stream``: the one it is zeroed and used on; None = torch's current one.
        """
        desc, slots = plan.desc, plan.sizes(layer).summary_slots_per_page
        heads = (num_pages, slots, desc.num_kv_heads)

        def zeros(name: str, last: int, dtype: Dtype) -> Any:
            return home.zeros(f"summaries.{name}", (*heads, last), dtype, stream)

        return cls(
            zeros("k_mean", desc.head_dim, Dtype.F32),
            zeros("v_mean", desc.head_dim, Dtype.F32) if values else None,
            zeros("seals", 2, Dtype.U32) if seals else None,
        )

    def for_step(self) -> Any:
        """A pointer to the struct for a call that reads it and, with seals, refreshes it first."""
        self._look(writable=self.seals is not None)
        return ctypes.pointer(self.struct)


class Selection(Tensors):
    """Scores ``[select spans, num_q_heads, max_blocks]`` f32, masks ``[.., mask_words]`` u32, or both."""

    struct: _abi_step.Selection

    def __init__(self, scores: Any = None, masks: Any = None) -> None:
        super().__init__(_abi_step.Selection, "selection", {"scores": scores, "masks": masks})
        self.scores, self.masks = scores, masks


class Table(Tensors):
    """Rows of physical boxes: ``counts [rows]``, ``stream_lens [rows]``, ``boxes [rows, max_boxes]``, int32."""

    struct: _abi_step.Table

    def __init__(self, counts: Any, stream_lens: Any, boxes: Any) -> None:
        tensors = {"counts": counts, "stream_lens": stream_lens, "boxes": boxes}
        super().__init__(_abi_step.Table, "table", tensors)
        self.counts, self.stream_lens, self.boxes = counts, stream_lens, boxes


class Padded(Tensors):
    """FlashAttention's form: ``counts [rows]``, ``seq_lens [rows]`` (seqused_k), ``pages [rows, width]``, int32."""

    struct: _abi_step.Padded

    def __init__(self, counts: Any, seq_lens: Any, pages: Any) -> None:
        tensors = {"counts": counts, "seq_lens": seq_lens, "pages": pages}
        super().__init__(_abi_step.Padded, "padded", tensors)
        self.counts, self.seq_lens, self.pages = counts, seq_lens, pages


class Csr(Tensors):
    """FlashInfer's form: ``indptr [rows + 1]``, ``indices [entries]``, ``last_page_len [rows]``, int32."""

    struct: _abi_step.Csr

    def __init__(self, indptr: Any, indices: Any, last_page_len: Any) -> None:
        tensors = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        super().__init__(_abi_step.Csr, "csr", tensors)
        self.indptr, self.indices, self.last_page_len = indptr, indices, last_page_len


@dataclass(frozen=True)
class Lists:
    """The blocks of each list, ``[rows, mask_words]`` u32; row = (span, list of that span)."""

    bits: Any
    rows: int
