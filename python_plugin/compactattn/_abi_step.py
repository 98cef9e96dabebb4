"""The structs of ``include/compactattn.h`` that callers fill in each step, and those they get back."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_void_p

from ._abi import Settings, Tensor, Versioned

_HEAD = [("struct_size", c_uint32), ("reserved", c_uint32)]


class Batch(Versioned):
    """``compactattn_batch``."""

    _fields_ = [
        *_HEAD,
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("cu_seqlens_q", Tensor),
        ("seq_lens", Tensor),
        ("block_table", Tensor),
        ("stream", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("k_scale", Tensor),
        ("v_scale", Tensor),
    ]


class Summaries(Versioned):
    """``compactattn_summaries``."""

    _fields_ = [*_HEAD, ("k_mean", Tensor), ("v_mean", Tensor), ("seals", Tensor)]


class Selection(Versioned):
    """``compactattn_selection``."""

    _fields_ = [*_HEAD, ("scores", Tensor), ("masks", Tensor)]


class Table(Versioned):
    """``compactattn_table``."""

    _fields_ = [*_HEAD, ("counts", Tensor), ("stream_lens", Tensor), ("boxes", Tensor)]


class Padded(Versioned):
    """``compactattn_padded``."""

    _fields_ = [*_HEAD, ("counts", Tensor), ("seq_lens", Tensor), ("pages", Tensor)]


class Csr(Versioned):
    """``compactattn_csr``."""

    _fields_ = [*_HEAD, ("indptr", Tensor), ("indices", Tensor), ("last_page_len", Tensor)]


class ForwardArgs(Versioned):
    """``compactattn_forward_args``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_int32),
        ("batch", ctypes.POINTER(Batch)),
        ("summaries", ctypes.POINTER(Summaries)),
        ("external", ctypes.POINTER(Selection)),
        ("settings", ctypes.POINTER(Settings)),
        ("out", Tensor),
        ("lse", Tensor),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("stream", c_void_p),
    ]


class AttendArgs(Versioned):
    """``compactattn_attend_args``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("layer", c_int32),
        ("batch", ctypes.POINTER(Batch)),
        ("table", ctypes.POINTER(Table)),
        ("lists", ctypes.POINTER(Tensor)),
        ("summaries", ctypes.POINTER(Summaries)),
        ("out", Tensor),
        ("lse", Tensor),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("stream", c_void_p),
    ]


class CombineArgs(Versioned):
    """``compactattn_combine_args``."""

    _fields_ = [
        *_HEAD,
        ("out_a", Tensor),
        ("lse_a", Tensor),
        ("out_b", Tensor),
        ("lse_b", Tensor),
        ("out", Tensor),
        ("lse", Tensor),
        ("stream", c_void_p),
    ]


class Sizes(Versioned):
    """``compactattn_sizes``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("workspace_alignment", c_uint32),
        ("workspace_bytes", c_int64),
        ("select_rows", c_int64),
        ("max_blocks", c_int64),
        ("mask_words", c_int64),
        ("list_rows", c_int64),
        ("max_boxes", c_int64),
        ("summary_slots_per_page", c_int64),
        ("select_span", c_int64),
        ("list_span", c_int64),
        ("lists_per_span", c_int64),
        ("block_size", c_int64),
        ("box_tokens", c_int64),
    ]


class Stats(Versioned):
    """``compactattn_stats``."""

    _fields_ = [
        *_HEAD,
        ("calls", c_int64),
        ("lists", c_int64),
        ("candidates", c_int64),
        ("selected", c_int64),
        ("forced", c_int64),
        ("guarded", c_int64),
        ("dense", c_int64),
        ("refused", c_int64),
    ]
