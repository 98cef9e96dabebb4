//! What C callers fill in once: tensors, contexts, settings, plans. Layouts are pinned at the end of the file.

use std::ffi::{c_char, c_void};

/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_dtype {
    /// bfloat16.
    COMPACTATTN_DTYPE_BF16 = 1,
    /// IEEE half.
    COMPACTATTN_DTYPE_F16 = 2,
    /// IEEE single; q, k, v and out on the CPU only.
    COMPACTATTN_DTYPE_F32 = 3,
    /// 32-bit signed integers: lengths, tables.
    COMPACTATTN_DTYPE_I32 = 4,
    /// 32-bit words: bit masks.
    COMPACTATTN_DTYPE_U32 = 5,
    /// 8-bit floats of 4 exponent and 3 mantissa bits, bias 7, finite but for one NaN of each sign ("e4m3fn"): k and v
    /// only.
    COMPACTATTN_DTYPE_E4M3 = 6,
}

/// Where memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_device_kind {
    /// In a tensor: the context's device, unchecked. Not for contexts.
    COMPACTATTN_DEVICE_DEFAULT = 0,
    /// Host memory.
    COMPACTATTN_DEVICE_CPU = 1,
    /// Memory of the CUDA device of that ordinal.
    COMPACTATTN_DEVICE_CUDA = 2,
}

/// Who scores the KV blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_selector {
    /// Everything is kept: plain attention through the same lists.
    COMPACTATTN_SELECTOR_DENSE = 0,
    /// Exact QK of a few query rows (the default of mode compactattn).
    COMPACTATTN_SELECTOR_SAMPLED_EXACT = 1,
    /// All rows against mean keys, max-relative threshold (arXiv 2603.06199).
    COMPACTATTN_SELECTOR_FLASHPREFILL = 2,
    /// Mean keys, mass summed over rows.
    COMPACTATTN_SELECTOR_POOLED_MASS = 3,
    /// pooled_mass keeps a multiple of the budget, sampled_exact re-scores those.
    COMPACTATTN_SELECTOR_TWO_LEVEL = 4,
    /// Learned gate on pooled queries and keys (arXiv 2410.13276).
    COMPACTATTN_SELECTOR_ATTN_GATE = 5,
    /// Token-level cosine scores of unusual queries (arXiv 2602.08722).
    COMPACTATTN_SELECTOR_QUOKA = 6,
    /// Antidiagonal samples (arXiv 2503.16428).
    COMPACTATTN_SELECTOR_XATTENTION = 7,
    /// Sink and local blocks only.
    COMPACTATTN_SELECTOR_STREAMING = 8,
    /// Exact block mass of every row: the bound a scorer can reach.
    COMPACTATTN_SELECTOR_ORACLE = 9,
    /// The caller's own scores or masks.
    COMPACTATTN_SELECTOR_EXTERNAL = 10,
}

/// Which blocks of one row of scores stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_keep {
    /// Scores of at least keep_value.
    COMPACTATTN_KEEP_THRESHOLD = 1,
    /// The fewest best blocks that hold the share keep_value: of all that is attended for sampled_exact, oracle and
    /// xattention, where what scores lack to 1 lies in the open region and counts as held; else of the total score.
    COMPACTATTN_KEEP_MASS = 2,
    /// The best ceil(keep_value * candidates) blocks.
    COMPACTATTN_KEEP_DENSITY = 3,
}

/// Where that is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_keep_at {
    /// For each select span and query head; union then ORs the masks.
    COMPACTATTN_KEEP_AT_ROW = 0,
    /// For each list, on scores merged over its rows.
    COMPACTATTN_KEEP_AT_LIST = 1,
}

/// Presets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_mode {
    /// Dense lists.
    COMPACTATTN_MODE_DENSE = 0,
    /// The product's default: sampled_exact, one list per query head and 1024 tokens.
    COMPACTATTN_MODE_COMPACTATTN = 1,
    /// FlashPrefill masks per query head and 128 tokens, no union.
    COMPACTATTN_MODE_BLOCK_SPARSE = 2,
    /// The paper's own point: FlashPrefill masks, united over the KV group and the whole chunk (arXiv 2605.16839).
    COMPACTATTN_MODE_PAPER = 3,
}

/// Which blocks compactattn_summaries_update summarises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum compactattn_which {
    /// Those that this step's tokens complete, and with seals those of other keys: call it after every KV write.
    COMPACTATTN_WHICH_COMPLETED = 0,
    /// Every whole block: without seals, after a swap-in, or a prefix hit whose summaries are not there.
    COMPACTATTN_WHICH_ALL = 1,
}

/// A context: one device. Opaque; the value is a number and is never followed.
pub struct compactattn_context {
    _opaque: (),
}

/// A plan: shapes and settings of one model on one rank. Opaque; the value is a number and is never followed.
pub struct compactattn_plan {
    _opaque: (),
}

/// A strided tensor in the caller's memory. One that is all zero means "none" where a tensor is optional.
///
/// data, and the strides of every dimension but the last of q, k, v and out, are multiples of 16 bytes; other tensors
/// are aligned to their element. The last stride is 1. Strides of dimensions of extent 1 are not looked at.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_tensor {
    /// First element; NULL only if some extent is 0.
    pub data: *mut c_void,
    /// Extents; entries at and after ndim are not looked at.
    pub shape: [i64; 4],
    /// Strides in elements.
    pub stride: [i64; 4],
    /// Bytes from data to the end of its allocation; 0 = unknown, and the caller vouches for the extents.
    pub storage_bytes: i64,
    /// A compactattn_dtype.
    pub dtype: i32,
    /// Dimensions, 1..4.
    pub ndim: i32,
    /// A compactattn_device_kind.
    pub device_kind: i32,
    /// Which device of that kind; 0 for the CPU.
    pub device_ordinal: i32,
}

/// What a context is made from.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_context_desc {
    /// sizeof(compactattn_context_desc).
    pub struct_size: u32,
    /// COMPACTATTN_ABI_VERSION of the header the caller was built with.
    pub abi_version: u32,
    /// COMPACTATTN_DEVICE_CPU or COMPACTATTN_DEVICE_CUDA.
    pub device_kind: i32,
    /// Which device; 0 for the CPU.
    pub device_ordinal: i32,
    /// CPU threads of one call; 0 = the cores this process may use.
    pub num_threads: i32,
    /// 0.
    pub reserved: u32,
}

/// Everything that steers selection in one layer. Fill it by compactattn_settings_init, then change fields.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_settings {
    /// sizeof(compactattn_settings).
    pub struct_size: u32,
    /// A compactattn_selector.
    pub selector: i32,
    /// Tokens per block: 16, 32, 64, 128 or 256; 1 for quoka.
    pub block_size: i32,
    /// Query tokens per list: 128, 256, 512, 1024 or 2048; 0 = the whole chunk.
    pub query_span: i32,
    /// Query heads per list within a KV group; 0 = the whole group.
    pub heads_per_list: i32,
    /// A compactattn_keep.
    pub keep: i32,
    /// Its number, in (0, 1].
    pub keep_value: f32,
    /// A compactattn_keep_at.
    pub keep_at: i32,
    /// Floor of the share of past blocks a list keeps, in [0, max_density].
    pub min_density: f32,
    /// Cap of that share, in (0, 1].
    pub max_density: f32,
    /// First blocks always kept.
    pub sink_blocks: i32,
    /// Last past blocks always kept.
    pub local_blocks: i32,
    /// A list that keeps more than this share of its past blocks becomes dense, in (0, 1]; 1 = never.
    pub density_guard: f32,
    /// 1 = mean keys and values, each of 512 past tokens, stand in for what is skipped of them;
    /// 0 = it is left out.
    pub mean_correction: i32,
    /// Dense while a request holds fewer KV tokens than this.
    pub dense_below_kv_len: i32,
    /// Dense for chunks of at most this many query tokens.
    pub dense_max_q_len: i32,
    /// Dense for chunks that end within the first so many tokens of a request.
    pub dense_prefix_tokens: i32,
    /// Query rows per span and head that sampled_exact, pooled_mass and two_level score; 0 = all.
    pub sample_rows: i32,
    /// flashprefill: the last so many spans of block_size rows of a chunk do not vote.
    pub flashprefill_non_voting_spans: i32,
    /// flashprefill: the best so many blocks of each row are kept whatever their score.
    pub flashprefill_min_budget: i32,
    /// flashprefill: 1 = look for the row's largest score among past blocks only; 0 = among all visible ones.
    pub flashprefill_relative_to_past: i32,
    /// quoka: share of a chunk's queries that score, in (0, 1].
    pub quoka_query_ratio: f32,
    /// xattention: tokens per antidiagonal sample; divides block_size.
    pub xattention_stride: i32,
    /// two_level: re-score this many times the budget; at least 1.
    pub two_level_factor: f32,
}

/// What a plan is made from. Pointers are read during the call only.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct compactattn_plan_desc {
    /// sizeof(compactattn_plan_desc).
    pub struct_size: u32,
    /// Query heads on this rank.
    pub num_q_heads: i32,
    /// KV heads on this rank; divides num_q_heads.
    pub num_kv_heads: i32,
    /// 64, 96, 128 or 256.
    pub head_dim: i32,
    /// Tokens per KV page of the engine: 16, 32, 64, 128 or 256.
    pub page_size: i32,
    /// Type of q and out: bf16, f16 or (CPU) f32.
    pub dtype: i32,
    /// Type of the KV cache: dtype, or e4m3 (CUDA: head_dim 64 or 128); 0 = dtype.
    pub kv_dtype: i32,
    /// Factor on q.k before the exponential; 0 = 1/sqrt(head_dim).
    pub sm_scale: f32,
    /// Requests of the largest step.
    pub max_num_reqs: i32,
    /// Layers with statistics (and perhaps settings) of their own; 0 = 1.
    pub num_layers: i32,
    /// Query tokens of the largest step, over all requests.
    pub max_total_q: i64,
    /// KV tokens of the longest request.
    pub max_kv_len: i64,
    /// Settings of every layer without its own; NULL = those of mode compactattn.
    pub settings: *const compactattn_settings,
    /// NULL, or num_layers pointers; a NULL one means settings.
    pub layer_settings: *const *const compactattn_settings,
    /// Safetensors file with the weights of selector attn_gate; NULL = none.
    pub gate_weights_path: *const c_char,
    /// Inverse frequencies of the model's rotary embedding, for selector attn_gate; NULL = none.
    pub rope_inv_freq: *const f32,
    /// Entries of rope_inv_freq: head_dim / 2, or 0 for none.
    pub rope_inv_freq_len: i32,
    /// 1 = rotary pairs are neighbours (2i, 2i+1); 0 = halves (i, i + head_dim/2).
    pub rope_interleaved: i32,
    /// KV splits of every list, 1..64 (CUDA: 1, nothing is split); 0 = 1 on the CPU, and on CUDA equal shares for all
    /// processors, with which the last bits of a result may depend on the rest of the batch.
    pub num_splits: i32,
    /// Tokens of a sliding window; 0 = none. None is offered: other values are E_UNSUPPORTED.
    pub sliding_window: i32,
    /// Soft cap on logits; 0 = none. None is offered.
    pub logits_soft_cap: f32,
    /// 1 = the model has learned attention sinks; 0 = none. None is offered.
    pub attention_sinks: i32,
    /// 1 = the model has ALiBi slopes; 0 = none. None is offered.
    pub alibi: i32,
    /// 0.
    pub reserved: u32,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<compactattn_tensor>() == 96 && offset_of!(compactattn_tensor, storage_bytes) == 72);
    assert!(size_of::<compactattn_context_desc>() == 24);
    assert!(
        size_of::<compactattn_settings>() == 96 && offset_of!(compactattn_settings, two_level_factor) == 92
    );
    assert!(
        size_of::<compactattn_plan_desc>() == 120 && offset_of!(compactattn_plan_desc, max_total_q) == 40
    );
    assert!(offset_of!(compactattn_plan_desc, num_splits) == 96);
};
