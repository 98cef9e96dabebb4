"""The structs and enums of ``include/compactattn.h``, field by field in the header's order.

``tests/python/test_abi.py`` compares every size and offset here with what a C compiler says about the header.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from enum import IntEnum

# COMPACTATTN_ABI_VERSION of the header these structs were written from.
ABI_VERSION = 1


class Dtype(IntEnum):
    """``compactattn_dtype``."""

    BF16 = 1
    F16 = 2
    F32 = 3
    I32 = 4
    U32 = 5
    E4M3 = 6


class DeviceKind(IntEnum):
    """``compactattn_device_kind``."""

    CPU = 1
    CUDA = 2


class Selector(IntEnum):
    """``compactattn_selector``."""

    DENSE = 0
    SAMPLED_EXACT = 1
    FLASHPREFILL = 2
    POOLED_MASS = 3
    TWO_LEVEL = 4
    ATTN_GATE = 5
    QUOKA = 6
    XATTENTION = 7
    STREAMING = 8
    ORACLE = 9
    EXTERNAL = 10


class Keep(IntEnum):
    """``compactattn_keep``."""

    THRESHOLD = 1
    MASS = 2
    DENSITY = 3


class KeepAt(IntEnum):
    """``compactattn_keep_at``."""

    ROW = 0
    LIST = 1


class Mode(IntEnum):
    """``compactattn_mode``."""

    DENSE = 0
    COMPACTATTN = 1
    BLOCK_SPARSE = 2
    PAPER = 3


class Which(IntEnum):
    """``compactattn_which``."""

    COMPLETED = 0
    ALL = 1


class Tensor(ctypes.Structure):
    """``compactattn_tensor``: strides in elements; all zero means none."""

    _fields_ = [
        ("data", c_void_p),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
        ("storage_bytes", c_int64),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("device_kind", c_int32),
        ("device_ordinal", c_int32),
    ]


class Versioned(ctypes.Structure):
    """A struct that starts with its own size."""

    def __init__(self, **fields: object) -> None:
        super().__init__(**fields)
        self.struct_size = ctypes.sizeof(self)


class ContextDesc(Versioned):
    """``compactattn_context_desc``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("abi_version", c_uint32),
        ("device_kind", c_int32),
        ("device_ordinal", c_int32),
        ("num_threads", c_int32),
        ("reserved", c_uint32),
    ]


class Settings(Versioned):
    """``compactattn_settings``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("selector", c_int32),
        ("block_size", c_int32),
        ("query_span", c_int32),
        ("heads_per_list", c_int32),
        ("keep", c_int32),
        ("keep_value", c_float),
        ("keep_at", c_int32),
        ("min_density", c_float),
        ("max_density", c_float),
        ("sink_blocks", c_int32),
        ("local_blocks", c_int32),
        ("density_guard", c_float),
        ("mean_correction", c_int32),
        ("dense_below_kv_len", c_int32),
        ("dense_max_q_len", c_int32),
        ("dense_prefix_tokens", c_int32),
        ("sample_rows", c_int32),
        ("flashprefill_non_voting_spans", c_int32),
        ("flashprefill_min_budget", c_int32),
        ("flashprefill_relative_to_past", c_int32),
        ("quoka_query_ratio", c_float),
        ("xattention_stride", c_int32),
        ("two_level_factor", c_float),
    ]


class PlanDesc(Versioned):
    """``compactattn_plan_desc``."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("num_q_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("page_size", c_int32),
        ("dtype", c_int32),
        ("kv_dtype", c_int32),
        ("sm_scale", c_float),
        ("max_num_reqs", c_int32),
        ("num_layers", c_int32),
        ("max_total_q", c_int64),
        ("max_kv_len", c_int64),
        ("settings", ctypes.POINTER(Settings)),
        ("layer_settings", ctypes.POINTER(ctypes.POINTER(Settings))),
        ("gate_weights_path", c_char_p),
        ("rope_inv_freq", ctypes.POINTER(c_float)),
        ("rope_inv_freq_len", c_int32),
        ("rope_interleaved", c_int32),
        ("num_splits", c_int32),
        ("sliding_window", c_int32),
        ("logits_soft_cap", c_float),
        ("attention_sinks", c_int32),
        ("alibi", c_int32),
        ("reserved", c_uint32),
    ]
