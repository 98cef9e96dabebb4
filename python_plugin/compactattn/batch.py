"""Batch: one step's tensors in the C struct, and what keeps them alive."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _abi_step
from .home import Home
from .tensors import View, view


class Batch(NamedTuple):
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
        views = (
            view("q", q),
            view("k_cache", k_cache),
            view("v_cache", v_cache),
            view("block_table", block_table),
            view("seq_lens", seq_lens),
            view("cu_seqlens_q", cu_seqlens_q),
        )
        struct = _abi_step.Batch()
        struct.q, struct.k, struct.v, struct.block_table, struct.seq_lens, struct.cu_seqlens_q = (
            x.tensor for x in views
        )
        if k_scale is None and v_scale is None:
            return cls(*views, struct, Home.of(views, cls._fields))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        scaled = {name: view(name, scale) for name, scale in scales.items() if scale is not None}
        for name, scale in scaled.items():
            setattr(struct, name, scale.tensor)
        home = Home.of((*views, *scaled.values()), (*cls._fields[: len(views)], *scaled))
        return cls(*views, struct, home, tuple(scaled.values()))
