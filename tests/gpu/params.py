"""The structs of cuda/params.h by ctypes, field for field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint64

THRESHOLD, MASS, DENSITY = 0, 1, 2


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Batch(ctypes.Structure):
    """One step, as the engine describes it."""

    _fields_ = [
        *_fields(c_uint64, "q k v cu_seqlens_q seq_lens block_table"),
        *_fields(c_int64, "q_token_stride q_head_stride k_page_stride k_token_stride k_head_stride"),
        *_fields(c_int64, "v_page_stride v_token_stride v_head_stride table_stride"),
        *_fields(c_int32, "table_width num_reqs total_q num_pages"),
        *_fields(c_uint64, "k_scale v_scale"),
        *_fields(c_int32, "k_scale_stride v_scale_stride"),
    ]


class Layout(ctypes.Structure):
    """How a layer cuts a step."""

    _fields_ = [
        *_fields(c_int32, "num_q_heads num_kv_heads group_size head_dim"),
        *_fields(c_int32, "log2_page_tokens log2_block_tokens log2_box_tokens heads_per_list lists_per_kv_head"),
        *_fields(c_int32, "list_span select_span max_kv_len max_blocks mask_words max_boxes"),
        ("sm_scale", c_float),
    ]


class Settings(ctypes.Structure):
    """What to keep."""

    _fields_ = [
        *_fields(c_int32, "all_dense dense_below_kv_len dense_max_q_len dense_prefix_tokens keep"),
        *_fields(c_float, "keep_value min_density max_density"),
        *_fields(c_int32, "keep_at_rows merge_max sink_blocks local_blocks"),
        ("density_guard", c_float),
        *_fields(c_int32, "mass_counts_open min_budget non_voting_spans sample_rows relative_to_past"),
        ("xattention_stride", c_int32),
        ("candidate_share", c_float),
    ]


class Request(ctypes.Structure):
    """One request, checked."""

    _fields_ = _fields(c_int32, "q_start q_len kv_len refused")


class Span(ctypes.Structure):
    """Consecutive query tokens of one request."""

    _fields_ = _fields(
        c_int32, "req first len q_start kv_end past dense votes first_select num_selects first_item chunk_items"
    )


class Counters(ctypes.Structure):
    """Written on device in every step."""

    _fields_ = _fields(c_int32, "num_list_spans num_select_spans num_items refused r0 r1 r2 r3")


class Wish(ctypes.Structure):
    """How a launch of cuda/select/cluster.cuh or mass_lists.cu is wanted; `then` 0: scores alone."""

    _fields_ = _fields(c_int32, "then pitch listed")


class WorkItem(ctypes.Structure):
    """One query tile over one list."""

    _fields_ = _fields(c_int32, "list_row kv_head q_token num_tokens q_head tokens_after num_heads stream_len")


class Stages(ctypes.Structure):
    """Buffers of one call."""

    _fields_ = [
        *_fields(c_uint64, "counters requests list_spans select_spans scores cells samples masks lists counts"),
        *_fields(c_uint64, "stream_lens boxes items arrivals pieces piece_starts costs k_mean stats stats_mirror"),
        *_fields(c_int32, "max_list_spans max_select_spans max_items num_ctas whole_items reserved"),
    ]


class Step(ctypes.Structure):
    """The one argument of every stage from batch to plan."""

    _fields_ = [("batch", Batch), ("layout", Layout), ("settings", Settings), ("stages", Stages)]


class Work(ctypes.Structure):
    """The lists and the items that read them."""

    _fields_ = [
        *_fields(c_uint64, "items pieces piece_starts boxes arrivals"),
        *_fields(c_int32, "num_ctas max_boxes heads_per_list log2_box_tokens"),
    ]


class Results(ctypes.Structure):
    """Where attend writes."""

    _fields_ = [
        *_fields(c_uint64, "out lse partial_out partial_lse"),
        *_fields(c_int64, "out_token_stride out_head_stride lse_token_stride lse_head_stride"),
    ]


class AttendParams(ctypes.Structure):
    """Everything attend reads but tensor maps."""

    _fields_ = [
        ("work", Work),
        ("results", Results),
        ("batch", Batch),
        *_fields(c_int32, "log2_box_tokens log2_boxes_per_page"),
        ("sm_scale", c_float),
        ("reserved", c_int32),
    ]


class Means(ctypes.Structure):
    """What mean correction reads and writes (cuda/common/means.cuh)."""

    _fields_ = [
        *_fields(c_uint64, "k v skipped k_mean v_mean spans lists"),
        *_fields(c_int32, "rows num_kv_heads head_dim lists_per_span mask_words"),
        *_fields(c_int32, "log2_block_tokens log2_blocks every_span"),
    ]


for _type, _bytes in (
    (Batch, 160),
    (Layout, 64),
    (Settings, 80),
    (Request, 16),
    (Span, 48),
    (Counters, 32),
    (WorkItem, 32),
    (Stages, 184),
    (Step, 488),
    (AttendParams, 296),
    (Means, 88),
):
    assert ctypes.sizeof(_type) == _bytes, _type
