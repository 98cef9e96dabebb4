"""Batch: one step's tensors in the C struct, and what keeps them alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _abi_step
from .home import Home
from .tensors import View, view


@dataclass(frozen=True)
class Batch:
    """One step's requests: prefill chunks and decode rows, ragged, in one packed q.

    Request r owns queries ``cu_seqlens_q[r]..cu_seqlens_q[r + 1]``, the last of its ``seq_lens[r]`` KV tokens; its
    chunk's KV is in the pool already. Nothing is copied; the tensors live as long as the batch.
    """

    q: View
    k: View
    v: View
    block_table: View
    seq_lens: View
    cu_seqlens_q: View
    struct: _abi_step.Batch
    home: Home
    # Of an e4m3 cache; held alive.
    scales: tuple[View, ...] = ()

    @classmethod
    def of(
        cls,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        block_table: Any,
        seq_lens: Any,
        cu_seqlens_q: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> Batch:
        """Looks at the tensors.

        ``q [total_q, num_q_heads, head_dim]``; ``k_cache``, ``v_cache [num_pages, page_size, num_kv_heads,
        head_dim]`` with any strides (NHD, HND, interleaved); ``block_table [num_reqs, width]``, ``seq_lens
        [num_reqs]``, ``cu_seqlens_q [num_reqs + 1]`` int32 (or, on the CPU, lists of ints), all on one device. Nothing
        of a CUDA tensor is read here. ``k_scale``, ``v_scale``: f32 ``[1]`` or ``[num_kv_heads]`` beside the caches,
        what the numbers of an e4m3 cache are multiplied by (None = 1). Raises InvalidArgument by name.
        """
        views = {
            "q": view("q", q),
            "k": view("k_cache", k_cache),
            "v": view("v_cache", v_cache),
            "block_table": view("block_table", block_table),
            "seq_lens": view("seq_lens", seq_lens),
            "cu_seqlens_q": view("cu_seqlens_q", cu_seqlens_q),
        }
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        scaled = {name: view(name, scale) for name, scale in scales.items() if scale is not None}
        struct = _abi_step.Batch(**{name: view.tensor for name, view in (views | scaled).items()})
        return cls(**views, struct=struct, home=Home.of(views | scaled), scales=tuple(scaled.values()))
