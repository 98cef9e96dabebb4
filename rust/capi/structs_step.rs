//! What C callers fill in each step, and what they get back. Layouts are pinned at the end of the file.

use std::ffi::c_void;

use super::structs::{compactattn_settings, compactattn_tensor};

/// One step's requests: prefill chunks and decode rows, ragged, in one packed q.
///
/// Request r owns queries cu_seqlens_q[r]..cu_seqlens_q[r+1], the last of its seq_lens[r] KV tokens (bottom-right
/// causal). The chunk's KV is in the pool already. NHD, HND, interleaved and contiguous caches differ in strides only.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_batch {
    /// sizeof(compactattn_batch).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [total_q, num_q_heads, head_dim], the plan's dtype.
    pub q: compactattn_tensor,
    /// [num_pages, page_size, num_kv_heads, head_dim], the plan's kv_dtype.
    pub k: compactattn_tensor,
    /// As k.
    pub v: compactattn_tensor,
    /// [num_reqs + 1] int32: from 0, not decreasing, ending at total_q.
    pub cu_seqlens_q: compactattn_tensor,
    /// [num_reqs] int32: KV tokens including this chunk.
    pub seq_lens: compactattn_tensor,
    /// [num_reqs, width] int32 page ids; entries after a row's ceil(seq_len / page_size) are never read.
    pub block_table: compactattn_tensor,
    /// CUDA: the stream of a stage called by itself (forward and attend take theirs from their arguments). NULL on a
    /// CPU context.
    pub stream: *mut c_void,
    /// CUDA: workspace of select, union and table_build, as in compactattn_forward_args. Ignored on a CPU context.
    pub workspace: *mut c_void,
    /// Bytes of workspace.
    pub workspace_bytes: i64,
    /// Of an e4m3 cache: what stored keys are multiplied by, [1] or [num_kv_heads] f32, finite and > 0; none = 1. In the
    /// context's memory, read when the step runs: of a CUDA context on the device, where values are not checked.
    pub k_scale: compactattn_tensor,
    /// As k_scale, of values.
    pub v_scale: compactattn_tensor,
}

/// Mean key (and value) of every whole block, kept by the caller beside the pool.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_summaries {
    /// sizeof(compactattn_summaries).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [num_pages, summary_slots_per_page, num_kv_heads, head_dim] f32, contiguous.
    pub k_mean: compactattn_tensor,
    /// As k_mean; needed for mean_correction only, else it may be none.
    pub v_mean: compactattn_tensor,
    /// [num_pages, summary_slots_per_page, num_kv_heads, 2] u32, contiguous, zeros at first: of which keys each summary
    /// is. With it, every call that reads summaries first writes those anew whose keys have changed, so none is ever
    /// stale, whoever wrote the pages; k_mean, v_mean and seals are outputs of such a call then. Scales are not keys: where
    /// k_scale or v_scale changes, update COMPACTATTN_WHICH_ALL. None = the caller sees to it that
    /// compactattn_summaries_update follows every KV write.
    pub seals: compactattn_tensor,
}

/// What select found: scores, masks or both. Rows are select spans, at most select_rows of compactattn_sizes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_selection {
    /// sizeof(compactattn_selection).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [select spans or more, num_q_heads, max_blocks] f32, contiguous; higher = keep sooner.
    pub scores: compactattn_tensor,
    /// [select spans or more, num_q_heads, mask_words] u32, contiguous: bit j % 32 of word j / 32 is block j.
    pub masks: compactattn_tensor,
}

/// Lists of physical boxes; a row is one list of one span. Entry page * boxes_per_page + part names box_tokens tokens.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_table {
    /// sizeof(compactattn_table).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [list rows or more] int32: boxes of a row.
    pub counts: compactattn_tensor,
    /// [list rows or more] int32: KV tokens in those boxes; the last one may be partial.
    pub stream_lens: compactattn_tensor,
    /// [list rows or more, max_boxes] int32, contiguous.
    pub boxes: compactattn_tensor,
}

/// Lists as padded tables of whole pages (FlashAttention's block_table and seqused_k).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_padded {
    /// sizeof(compactattn_padded).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [list rows or more] int32: pages of a row.
    pub counts: compactattn_tensor,
    /// [list rows or more] int32: KV tokens in those pages.
    pub seq_lens: compactattn_tensor,
    /// [list rows or more, width] int32, contiguous; entries after a row's count become 0.
    pub pages: compactattn_tensor,
}

/// Lists as CSR tables of whole pages (FlashInfer's indptr, indices and last_page_len).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_csr {
    /// sizeof(compactattn_csr).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [list rows + 1 or more] int32.
    pub indptr: compactattn_tensor,
    /// [entries or more] int32.
    pub indices: compactattn_tensor,
    /// [list rows or more] int32: tokens in a row's last page; 0 for an empty row.
    pub last_page_len: compactattn_tensor,
}

/// Arguments of compactattn_forward.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_forward_args {
    /// sizeof(compactattn_forward_args).
    pub struct_size: u32,
    /// The layer: picks settings and statistics.
    pub layer: i32,
    /// The step.
    pub batch: *const compactattn_batch,
    /// Block means kept by the caller; NULL = made anew in this call where the selector needs them.
    pub summaries: *const compactattn_summaries,
    /// For selector external: scores or masks, not both. NULL otherwise.
    pub external: *const compactattn_selection,
    /// Settings of this call; NULL = the plan's. compactattn_plan_sizes tells the workspace they need.
    pub settings: *const compactattn_settings,
    /// [total_q, num_q_heads, head_dim], q's dtype; overlaps nothing else.
    pub out: compactattn_tensor,
    /// Optional [num_q_heads, total_q] f32, natural logarithm; a row that sees nothing gets -inf and out 0.
    pub lse: compactattn_tensor,
    /// workspace_bytes of compactattn_sizes, aligned to workspace_alignment; contents mean nothing.
    pub workspace: *mut c_void,
    /// Bytes of workspace.
    pub workspace_bytes: i64,
    /// The CUDA stream; NULL on a CPU context.
    pub stream: *mut c_void,
}

/// Arguments of compactattn_attend.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_attend_args {
    /// sizeof(compactattn_attend_args).
    pub struct_size: u32,
    /// The layer.
    pub layer: i32,
    /// The step.
    pub batch: *const compactattn_batch,
    /// What to read: checked entry by entry.
    pub table: *const compactattn_table,
    /// For mean correction: the lists that table was built from, and summaries with v_mean, which are read as they are.
    /// Both or neither; on CUDA for layers with mean_correction, whose workspace has room for it.
    pub lists: *const compactattn_tensor,
    /// See lists.
    pub summaries: *const compactattn_summaries,
    /// As in compactattn_forward_args.
    pub out: compactattn_tensor,
    /// As in compactattn_forward_args.
    pub lse: compactattn_tensor,
    /// As in compactattn_forward_args.
    pub workspace: *mut c_void,
    /// Bytes of workspace.
    pub workspace_bytes: i64,
    /// The CUDA stream; NULL on a CPU context.
    pub stream: *mut c_void,
}

/// Arguments of compactattn_combine: two results over disjoint KV, and where their union goes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_combine_args {
    /// sizeof(compactattn_combine_args).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// [total_q, num_q_heads, head_dim], the plan's dtype.
    pub out_a: compactattn_tensor,
    /// [num_q_heads, total_q] f32.
    pub lse_a: compactattn_tensor,
    /// As out_a.
    pub out_b: compactattn_tensor,
    /// As lse_a.
    pub lse_b: compactattn_tensor,
    /// As out_a; overlaps nothing else.
    pub out: compactattn_tensor,
    /// As lse_a, optional; overlaps nothing else.
    pub lse: compactattn_tensor,
    /// The CUDA stream; NULL on a CPU context.
    pub stream: *mut c_void,
}

/// How large the buffers of one layer's largest step are. Set struct_size before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_sizes {
    /// sizeof(compactattn_sizes).
    pub struct_size: u32,
    /// Alignment of a workspace in bytes.
    pub workspace_alignment: u32,
    /// Bytes of workspace; without settings of the call's own, enough for every layer of the plan.
    pub workspace_bytes: i64,
    /// Most rows (select spans) of scores and masks.
    pub select_rows: i64,
    /// Last extent of scores.
    pub max_blocks: i64,
    /// Last extent of masks and lists.
    pub mask_words: i64,
    /// Most rows of lists and of a table.
    pub list_rows: i64,
    /// Last extent of a table's boxes.
    pub max_boxes: i64,
    /// Second extent of summaries.
    pub summary_slots_per_page: i64,
    /// Query tokens per select span; 0 = the whole chunk.
    pub select_span: i64,
    /// Query tokens per list; 0 = the whole chunk.
    pub list_span: i64,
    /// Lists of one span, over all KV heads.
    pub lists_per_span: i64,
    /// Tokens per block.
    pub block_size: i64,
    /// Tokens per box.
    pub box_tokens: i64,
}

/// What forward calls have selected since the plan was made. Set struct_size before the call.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_stats {
    /// sizeof(compactattn_stats).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Calls of compactattn_forward; on CUDA this and what follows count compactattn_union too.
    pub calls: i64,
    /// Lists.
    pub lists: i64,
    /// Past blocks that sparse lists could select.
    pub candidates: i64,
    /// Past blocks that they did.
    pub selected: i64,
    /// Forced (sink and local) blocks.
    pub forced: i64,
    /// Lists that the density guard made dense.
    pub guarded: i64,
    /// Lists that were dense by policy.
    pub dense: i64,
    /// CUDA: requests left out for a length or page id out of range, found on the device; in checked mode also lists that
    /// were damaged before attend: out 0, lse -inf.
    pub refused: i64,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<compactattn_batch>() == 800 && offset_of!(compactattn_batch, block_table) == 488);
    assert!(size_of::<compactattn_summaries>() == 296 && size_of::<compactattn_selection>() == 200);
    assert!(size_of::<compactattn_table>() == 296 && size_of::<compactattn_padded>() == 296);
    assert!(size_of::<compactattn_csr>() == 296 && size_of::<compactattn_combine_args>() == 592);
    assert!(size_of::<compactattn_forward_args>() == 256 && offset_of!(compactattn_forward_args, out) == 40);
    assert!(
        size_of::<compactattn_attend_args>() == 256 && offset_of!(compactattn_attend_args, stream) == 248
    );
    assert!(size_of::<compactattn_sizes>() == 104 && size_of::<compactattn_stats>() == 72);
};
