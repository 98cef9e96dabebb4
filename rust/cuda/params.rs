//! Launch parameters: the structs of `cuda/params.h`, field for field. Addresses are device memory unless said
//! otherwise; strides count elements.

/// One step, as the engine describes it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Batch {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) cu_seqlens_q: u64,
    pub(crate) seq_lens: u64,
    pub(crate) block_table: u64,
    pub(crate) q_token_stride: i64,
    pub(crate) q_head_stride: i64,
    pub(crate) k_page_stride: i64,
    pub(crate) k_token_stride: i64,
    pub(crate) k_head_stride: i64,
    pub(crate) v_page_stride: i64,
    pub(crate) v_token_stride: i64,
    pub(crate) v_head_stride: i64,
    pub(crate) table_stride: i64,
    pub(crate) table_width: i32,
    pub(crate) num_reqs: i32,
    pub(crate) total_q: i32,
    pub(crate) num_pages: i32,
    pub(crate) k_scale: u64,
    pub(crate) v_scale: u64,
    pub(crate) k_scale_stride: i32,
    pub(crate) v_scale_stride: i32,
}

/// How a layer cuts a step.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Layout {
    pub(crate) num_q_heads: i32,
    pub(crate) num_kv_heads: i32,
    pub(crate) group_size: i32,
    pub(crate) head_dim: i32,
    pub(crate) log2_page_tokens: i32,
    pub(crate) log2_block_tokens: i32,
    pub(crate) log2_box_tokens: i32,
    pub(crate) heads_per_list: i32,
    pub(crate) lists_per_kv_head: i32,
    pub(crate) list_span: i32,
    pub(crate) select_span: i32,
    pub(crate) max_kv_len: i32,
    pub(crate) max_blocks: i32,
    pub(crate) mask_words: i32,
    pub(crate) max_boxes: i32,
    pub(crate) sm_scale: f32,
}

/// What to keep.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Settings {
    pub(crate) all_dense: i32,
    pub(crate) dense_below_kv_len: i32,
    pub(crate) dense_max_q_len: i32,
    pub(crate) dense_prefix_tokens: i32,
    pub(crate) keep: i32,
    pub(crate) keep_value: f32,
    pub(crate) min_density: f32,
    pub(crate) max_density: f32,
    pub(crate) keep_at_rows: i32,
    pub(crate) merge_max: i32,
    pub(crate) sink_blocks: i32,
    pub(crate) local_blocks: i32,
    pub(crate) density_guard: f32,
    pub(crate) mass_counts_open: i32,
    pub(crate) min_budget: i32,
    pub(crate) non_voting_spans: i32,
    pub(crate) sample_rows: i32,
    pub(crate) relative_to_past: i32,
    pub(crate) xattention_stride: i32,
    pub(crate) candidate_share: f32,
}

/// Buffers of one call, all but summaries and stats in its workspace.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Stages {
    pub(crate) counters: u64,
    pub(crate) requests: u64,
    pub(crate) list_spans: u64,
    pub(crate) select_spans: u64,
    pub(crate) scores: u64,
    pub(crate) cells: u64,
    pub(crate) samples: u64,
    pub(crate) masks: u64,
    pub(crate) lists: u64,
    pub(crate) counts: u64,
    pub(crate) stream_lens: u64,
    pub(crate) boxes: u64,
    pub(crate) items: u64,
    pub(crate) arrivals: u64,
    pub(crate) pieces: u64,
    pub(crate) piece_starts: u64,
    pub(crate) costs: u64,
    pub(crate) k_mean: u64,
    pub(crate) stats: u64,
    pub(crate) stats_mirror: u64,
    pub(crate) max_list_spans: i32,
    pub(crate) max_select_spans: i32,
    pub(crate) max_items: i32,
    pub(crate) num_ctas: i32,
    pub(crate) whole_items: i32,
    pub(crate) reserved: i32,
}

/// The one argument of every stage from batch to plan.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Step {
    pub(crate) batch: Batch,
    pub(crate) layout: Layout,
    pub(crate) settings: Settings,
    pub(crate) stages: Stages,
}

/// The lists and the items that read them.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Work {
    pub(crate) items: u64,
    pub(crate) pieces: u64,
    pub(crate) piece_starts: u64,
    pub(crate) boxes: u64,
    pub(crate) arrivals: u64,
    pub(crate) num_ctas: i32,
    pub(crate) max_boxes: i32,
    pub(crate) heads_per_list: i32,
    pub(crate) log2_box_tokens: i32,
}

/// Where attend writes.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Results {
    pub(crate) out: u64,
    pub(crate) lse: u64,
    pub(crate) partial_out: u64,
    pub(crate) partial_lse: u64,
    pub(crate) out_token_stride: i64,
    pub(crate) out_head_stride: i64,
    pub(crate) lse_token_stride: i64,
    pub(crate) lse_head_stride: i64,
}

/// Everything attend reads but its tensor maps.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct AttendParams {
    pub(crate) work: Work,
    pub(crate) results: Results,
    pub(crate) batch: Batch,
    pub(crate) log2_box_tokens: i32,
    pub(crate) log2_boxes_per_page: i32,
    pub(crate) sm_scale: f32,
    pub(crate) reserved: i32,
}

/// What mean correction reads and writes, of `cuda/common/means.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Means {
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) skipped: u64,
    pub(crate) k_mean: u64,
    pub(crate) v_mean: u64,
    pub(crate) spans: u64,
    pub(crate) lists: u64,
    pub(crate) rows: i32,
    pub(crate) num_kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) lists_per_span: i32,
    pub(crate) mask_words: i32,
    pub(crate) log2_block_tokens: i32,
    pub(crate) log2_blocks: i32,
    pub(crate) every_span: i32,
}

/// Bytes of `Counters`.
pub(crate) const COUNTERS_BYTES: usize = 32;
/// Bytes of one `Request`.
pub(crate) const REQUEST_BYTES: usize = 16;
/// Bytes of one `Span`.
pub(crate) const SPAN_BYTES: usize = 48;
/// Bytes of one `WorkItem`.
pub(crate) const ITEM_BYTES: usize = 32;
/// Bytes of one `Piece`.
pub(crate) const PIECE_BYTES: usize = 16;
/// Counters of arrivals where two CTAs' shares meet (cuda/params.h, `kArrivals`).
pub(crate) const ARRIVALS: usize = 8;
/// Numbers of one `Stats`.
pub(crate) const STATS_WORDS: usize = 8;
/// Query rows of a tile.
pub(crate) const TILE_ROWS: usize = 128;
/// Tokens of a stream, or means, in a tile.
pub(crate) const TILE_TOKENS: usize = 128;

// What cuda/params.h asserts on its side.
const _: () = {
    assert!(size_of::<Batch>() == 160 && size_of::<Layout>() == 64 && size_of::<Settings>() == 80);
    assert!(size_of::<Stages>() == 184 && size_of::<Step>() == 488);
    assert!(size_of::<Work>() == 56 && size_of::<Results>() == 64 && size_of::<AttendParams>() == 296);
    assert!(size_of::<Means>() == 88);
    assert!(std::mem::offset_of!(Step, stages) == 304 && std::mem::offset_of!(AttendParams, batch) == 120);
};
/// What follows scores in the launch that makes them (`Then` of cuda/select/cluster.cuh).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Then {
    /// Nothing.
    Scores = 0,
    /// union and table.
    Lists = 1,
    /// The blocks that `two_level` scores again.
    Candidates = 2,
}

/// How such a launch is wanted (`Wish` there).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Wish {
    pub(crate) then: Then,
    /// Floats between rows of a slice's cells in shared memory.
    pub(crate) pitch: u32,
    /// Blocks that are no candidates score 0 (or NaN).
    pub(crate) listed: u32,
}
