/* CompactAttention: chunked-prefill attention over the KV pages that matter, in place in a paged cache. */

#ifndef COMPACTATTN_H
#define COMPACTATTN_H

/* Generated from rust/capi; do not edit. Rewrite: COMPACTATTN_UPDATE_HEADER=1 cargo test --test header */

#include <stddef.h>
#include <stdint.h>

#define COMPACTATTN_VERSION_MAJOR 0
#define COMPACTATTN_VERSION_MINOR 1
#define COMPACTATTN_VERSION_PATCH 0
#define COMPACTATTN_VERSION_STRING "0.1.0"
/* What compactattn_context_desc.abi_version must hold. */
#define COMPACTATTN_ABI_VERSION 1u

// What a call ended in. Values are explicit and never reused.
//
// 0: the call did what it says. 1-99: the caller's mistake, found before anything ran; nothing was written.
// 100-199: driver or device. 200 and up: a fault of the library. `compactattn_last_error` has the details.
enum compactattn_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The call did what it says.
  COMPACTATTN_OK = 0,
  // A required pointer or handle is NULL.
  COMPACTATTN_E_NULL = 1,
  // `struct_size` is unknown, or a newer struct asks for something this library does not know.
  COMPACTATTN_E_STRUCT_SIZE = 2,
  // Not a live handle of this kind: destroyed, foreign, or never created here.
  COMPACTATTN_E_HANDLE = 3,
  // The handle was made before a fork; this is the child.
  COMPACTATTN_E_WRONG_PROCESS = 4,
  // The caller was built for another ABI major.
  COMPACTATTN_E_ABI = 5,
  // Extents that contradict each other.
  COMPACTATTN_E_SHAPE = 6,
  // A number outside its range.
  COMPACTATTN_E_VALUE = 7,
  // Well formed, but not offered; the reason says what is.
  COMPACTATTN_E_UNSUPPORTED = 8,
  // A dtype that is unknown here or differs from its partners.
  COMPACTATTN_E_DTYPE = 9,
  // A stride that is zero, negative, too short, or makes elements overlap.
  COMPACTATTN_E_STRIDE = 10,
  // A base address or stride that misses its alignment.
  COMPACTATTN_E_ALIGN = 11,
  // An output overlaps an input or another output.
  COMPACTATTN_E_ALIAS = 12,
  // Tensors, workspace or handle live on different devices.
  COMPACTATTN_E_DEVICE = 13,
  // Host memory where device memory is wanted.
  COMPACTATTN_E_NOT_DEVICE = 14,
  // The workspace is missing, misaligned or too small.
  COMPACTATTN_E_WORKSPACE = 15,
  // A sequence length that contradicts the batch.
  COMPACTATTN_E_SEQLEN = 16,
  // A block-table entry inside the valid prefix that names no page of the pool.
  COMPACTATTN_E_TABLE = 17,
  // A product of extents does not fit 63 bits.
  COMPACTATTN_E_OVERFLOW = 18,
  // The object is in use by another thread.
  COMPACTATTN_E_BUSY = 19,
  // The call cannot be recorded into a CUDA graph.
  COMPACTATTN_E_CAPTURE = 20,
  // Not a stream of the context's device.
  COMPACTATTN_E_STREAM = 21,
  // A setting from the environment or a file cannot be understood.
  COMPACTATTN_E_CONFIG = 22,
  // A file cannot be read or written.
  COMPACTATTN_E_IO = 23,
  // `libcuda.so.1` is missing.
  COMPACTATTN_E_NO_DRIVER = 100,
  // The driver is older than the kernels need.
  COMPACTATTN_E_DRIVER_OLD = 101,
  // This library was built without GPU kernels.
  COMPACTATTN_E_NOT_BUILT = 102,
  // No kernel for this GPU's architecture.
  COMPACTATTN_E_ARCH = 103,
  // An embedded kernel image is damaged.
  COMPACTATTN_E_IMAGE = 104,
  // The driver refused a call.
  COMPACTATTN_E_CUDA = 105,
  // The CUDA context is lost; every later call says so too.
  COMPACTATTN_E_CONTEXT_LOST = 106,
  // No GPU is visible.
  COMPACTATTN_E_NO_DEVICE = 107,
  // Memory ran out.
  COMPACTATTN_E_OUT_OF_MEMORY = 108,
  // A fault of this library.
  COMPACTATTN_E_INTERNAL = 200,
  // A panic was stopped at the border; the handle involved must be destroyed.
  COMPACTATTN_E_PANIC = 201,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_status compactattn_status;
#else
typedef int32_t compactattn_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Element types.
enum compactattn_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // bfloat16.
  COMPACTATTN_DTYPE_BF16 = 1,
  // IEEE half.
  COMPACTATTN_DTYPE_F16 = 2,
  // IEEE single; q, k, v and out on the CPU only.
  COMPACTATTN_DTYPE_F32 = 3,
  // 32-bit signed integers: lengths, tables.
  COMPACTATTN_DTYPE_I32 = 4,
  // 32-bit words: bit masks.
  COMPACTATTN_DTYPE_U32 = 5,
  // 8-bit floats of 4 exponent and 3 mantissa bits, bias 7, finite but for one NaN of each sign ("e4m3fn"): k and v
  // only.
  COMPACTATTN_DTYPE_E4M3 = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_dtype compactattn_dtype;
#else
typedef int32_t compactattn_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Where memory lies.
enum compactattn_device_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // In a tensor: the context's device, unchecked. Not for contexts.
  COMPACTATTN_DEVICE_DEFAULT = 0,
  // Host memory.
  COMPACTATTN_DEVICE_CPU = 1,
  // Memory of the CUDA device of that ordinal.
  COMPACTATTN_DEVICE_CUDA = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_device_kind compactattn_device_kind;
#else
typedef int32_t compactattn_device_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Who scores the KV blocks.
enum compactattn_selector
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Everything is kept: plain attention through the same lists.
  COMPACTATTN_SELECTOR_DENSE = 0,
  // Exact QK of a few query rows (the default of mode compactattn).
  COMPACTATTN_SELECTOR_SAMPLED_EXACT = 1,
  // All rows against mean keys, max-relative threshold (arXiv 2603.06199).
  COMPACTATTN_SELECTOR_FLASHPREFILL = 2,
  // Mean keys, mass summed over rows.
  COMPACTATTN_SELECTOR_POOLED_MASS = 3,
  // pooled_mass keeps a multiple of the budget, sampled_exact re-scores those.
  COMPACTATTN_SELECTOR_TWO_LEVEL = 4,
  // Learned gate on pooled queries and keys (arXiv 2410.13276).
  COMPACTATTN_SELECTOR_ATTN_GATE = 5,
  // Token-level cosine scores of unusual queries (arXiv 2602.08722).
  COMPACTATTN_SELECTOR_QUOKA = 6,
  // Antidiagonal samples (arXiv 2503.16428).
  COMPACTATTN_SELECTOR_XATTENTION = 7,
  // Sink and local blocks only.
  COMPACTATTN_SELECTOR_STREAMING = 8,
  // Exact block mass of every row: the bound a scorer can reach.
  COMPACTATTN_SELECTOR_ORACLE = 9,
  // The caller's own scores or masks.
  COMPACTATTN_SELECTOR_EXTERNAL = 10,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_selector compactattn_selector;
#else
typedef int32_t compactattn_selector;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Which blocks of one row of scores stay.
enum compactattn_keep
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Scores of at least keep_value.
  COMPACTATTN_KEEP_THRESHOLD = 1,
  // The fewest best blocks that hold the share keep_value: of all that is attended for sampled_exact, oracle and
  // xattention, where what scores lack to 1 lies in the open region and counts as held; else of the total score.
  COMPACTATTN_KEEP_MASS = 2,
  // The best ceil(keep_value * candidates) blocks.
  COMPACTATTN_KEEP_DENSITY = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_keep compactattn_keep;
#else
typedef int32_t compactattn_keep;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Where that is decided.
enum compactattn_keep_at
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // For each select span and query head; union then ORs the masks.
  COMPACTATTN_KEEP_AT_ROW = 0,
  // For each list, on scores merged over its rows.
  COMPACTATTN_KEEP_AT_LIST = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_keep_at compactattn_keep_at;
#else
typedef int32_t compactattn_keep_at;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Presets.
enum compactattn_mode
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Dense lists.
  COMPACTATTN_MODE_DENSE = 0,
  // The product's default: sampled_exact, one list per query head and 1024 tokens.
  COMPACTATTN_MODE_COMPACTATTN = 1,
  // FlashPrefill masks per query head and 128 tokens, no union.
  COMPACTATTN_MODE_BLOCK_SPARSE = 2,
  // The paper's own point: FlashPrefill masks, united over the KV group and the whole chunk (arXiv 2605.16839).
  COMPACTATTN_MODE_PAPER = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_mode compactattn_mode;
#else
typedef int32_t compactattn_mode;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Which blocks compactattn_summaries_update summarises.
enum compactattn_which
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Those that this step's tokens complete, and with seals those of other keys: call it after every KV write.
  COMPACTATTN_WHICH_COMPLETED = 0,
  // Every whole block: without seals, after a swap-in, or a prefix hit whose summaries are not there.
  COMPACTATTN_WHICH_ALL = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum compactattn_which compactattn_which;
#else
typedef int32_t compactattn_which;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A context: one device. Opaque; the value is a number and is never followed.
typedef struct compactattn_context compactattn_context;

// A plan: shapes and settings of one model on one rank. Opaque; the value is a number and is never followed.
typedef struct compactattn_plan compactattn_plan;

// What a context is made from.
typedef struct compactattn_context_desc {
  // sizeof(compactattn_context_desc).
  uint32_t struct_size;
  // COMPACTATTN_ABI_VERSION of the header the caller was built with.
  uint32_t abi_version;
  // COMPACTATTN_DEVICE_CPU or COMPACTATTN_DEVICE_CUDA.
  int32_t device_kind;
  // Which device; 0 for the CPU.
  int32_t device_ordinal;
  // CPU threads of one call; 0 = the cores this process may use.
  int32_t num_threads;
  // 0.
  uint32_t reserved;
} compactattn_context_desc;

// Everything that steers selection in one layer. Fill it by compactattn_settings_init, then change fields.
typedef struct compactattn_settings {
  // sizeof(compactattn_settings).
  uint32_t struct_size;
  // A compactattn_selector.
  int32_t selector;
  // Tokens per block: 16, 32, 64, 128 or 256; 1 for quoka.
  int32_t block_size;
  // Query tokens per list: 128, 256, 512, 1024 or 2048; 0 = the whole chunk.
  int32_t query_span;
  // Query heads per list within a KV group; 0 = the whole group.
  int32_t heads_per_list;
  // A compactattn_keep.
  int32_t keep;
  // Its number, in (0, 1].
  float keep_value;
  // A compactattn_keep_at.
  int32_t keep_at;
  // Floor of the share of past blocks a list keeps, in [0, max_density].
  float min_density;
  // Cap of that share, in (0, 1].
  float max_density;
  // First blocks always kept.
  int32_t sink_blocks;
  // Last past blocks always kept.
  int32_t local_blocks;
  // A list that keeps more than this share of its past blocks becomes dense, in (0, 1]; 1 = never.
  float density_guard;
  // 1 = mean keys and values, each of 512 past tokens, stand in for what is skipped of them;
  // 0 = it is left out.
  int32_t mean_correction;
  // Dense while a request holds fewer KV tokens than this.
  int32_t dense_below_kv_len;
  // Dense for chunks of at most this many query tokens.
  int32_t dense_max_q_len;
  // Dense for chunks that end within the first so many tokens of a request.
  int32_t dense_prefix_tokens;
  // Query rows per span and head that sampled_exact, pooled_mass and two_level score; 0 = all.
  int32_t sample_rows;
  // flashprefill: the last so many spans of block_size rows of a chunk do not vote.
  int32_t flashprefill_non_voting_spans;
  // flashprefill: the best so many blocks of each row are kept whatever their score.
  int32_t flashprefill_min_budget;
  // flashprefill: 1 = look for the row's largest score among past blocks only; 0 = among all visible ones.
  int32_t flashprefill_relative_to_past;
  // quoka: share of a chunk's queries that score, in (0, 1].
  float quoka_query_ratio;
  // xattention: tokens per antidiagonal sample; divides block_size.
  int32_t xattention_stride;
  // two_level: re-score this many times the budget; at least 1.
  float two_level_factor;
} compactattn_settings;

// What a plan is made from. Pointers are read during the call only.
typedef struct compactattn_plan_desc {
  // sizeof(compactattn_plan_desc).
  uint32_t struct_size;
  // Query heads on this rank.
  int32_t num_q_heads;
  // KV heads on this rank; divides num_q_heads.
  int32_t num_kv_heads;
  // 64, 96, 128 or 256.
  int32_t head_dim;
  // Tokens per KV page of the engine: 16, 32, 64, 128 or 256.
  int32_t page_size;
  // Type of q and out: bf16, f16 or (CPU) f32.
  int32_t dtype;
  // Type of the KV cache: dtype, or e4m3 (CUDA: head_dim 64 or 128); 0 = dtype.
  int32_t kv_dtype;
  // Factor on q.k before the exponential; 0 = 1/sqrt(head_dim).
  float sm_scale;
  // Requests of the largest step.
  int32_t max_num_reqs;
  // Layers with statistics (and perhaps settings) of their own; 0 = 1.
  int32_t num_layers;
  // Query tokens of the largest step, over all requests.
  int64_t max_total_q;
  // KV tokens of the longest request.
  int64_t max_kv_len;
  // Settings of every layer without its own; NULL = those of mode compactattn.
  const struct compactattn_settings *settings;
  // NULL, or num_layers pointers; a NULL one means settings.
  const struct compactattn_settings *const *layer_settings;
  // Safetensors file with the weights of selector attn_gate; NULL = none.
  const char *gate_weights_path;
  // Inverse frequencies of the model's rotary embedding, for selector attn_gate; NULL = none.
  const float *rope_inv_freq;
  // Entries of rope_inv_freq: head_dim / 2, or 0 for none.
  int32_t rope_inv_freq_len;
  // 1 = rotary pairs are neighbours (2i, 2i+1); 0 = halves (i, i + head_dim/2).
  int32_t rope_interleaved;
  // KV splits of every list, 1..64 (CUDA: 1, nothing is split); 0 = 1 on the CPU, and on CUDA equal shares for all
  // processors, with which the last bits of a result may depend on the rest of the batch.
  int32_t num_splits;
  // Tokens of a sliding window; 0 = none. None is offered: other values are E_UNSUPPORTED.
  int32_t sliding_window;
  // Soft cap on logits; 0 = none. None is offered.
  float logits_soft_cap;
  // 1 = the model has learned attention sinks; 0 = none. None is offered.
  int32_t attention_sinks;
  // 1 = the model has ALiBi slopes; 0 = none. None is offered.
  int32_t alibi;
  // 0.
  uint32_t reserved;
} compactattn_plan_desc;

// How large the buffers of one layer's largest step are. Set struct_size before the call.
typedef struct compactattn_sizes {
  // sizeof(compactattn_sizes).
  uint32_t struct_size;
  // Alignment of a workspace in bytes.
  uint32_t workspace_alignment;
  // Bytes of workspace; without settings of the call's own, enough for every layer of the plan.
  int64_t workspace_bytes;
  // Most rows (select spans) of scores and masks.
  int64_t select_rows;
  // Last extent of scores.
  int64_t max_blocks;
  // Last extent of masks and lists.
  int64_t mask_words;
  // Most rows of lists and of a table.
  int64_t list_rows;
  // Last extent of a table's boxes.
  int64_t max_boxes;
  // Second extent of summaries.
  int64_t summary_slots_per_page;
  // Query tokens per select span; 0 = the whole chunk.
  int64_t select_span;
  // Query tokens per list; 0 = the whole chunk.
  int64_t list_span;
  // Lists of one span, over all KV heads.
  int64_t lists_per_span;
  // Tokens per block.
  int64_t block_size;
  // Tokens per box.
  int64_t box_tokens;
} compactattn_sizes;

// What forward calls have selected since the plan was made. Set struct_size before the call.
typedef struct compactattn_stats {
  // sizeof(compactattn_stats).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // Calls of compactattn_forward; on CUDA this and what follows count compactattn_union too.
  int64_t calls;
  // Lists.
  int64_t lists;
  // Past blocks that sparse lists could select.
  int64_t candidates;
  // Past blocks that they did.
  int64_t selected;
  // Forced (sink and local) blocks.
  int64_t forced;
  // Lists that the density guard made dense.
  int64_t guarded;
  // Lists that were dense by policy.
  int64_t dense;
  // CUDA: requests left out for a length or page id out of range, found on the device; in checked mode also lists that
  // were damaged before attend: out 0, lse -inf.
  int64_t refused;
} compactattn_stats;

// A strided tensor in the caller's memory. One that is all zero means "none" where a tensor is optional.
//
// data, and the strides of every dimension but the last of q, k, v and out, are multiples of 16 bytes; other tensors
// are aligned to their element. The last stride is 1. Strides of dimensions of extent 1 are not looked at.
typedef struct compactattn_tensor {
  // First element; NULL only if some extent is 0.
  void *data;
  // Extents; entries at and after ndim are not looked at.
  int64_t shape[4];
  // Strides in elements.
  int64_t stride[4];
  // Bytes from data to the end of its allocation; 0 = unknown, and the caller vouches for the extents.
  int64_t storage_bytes;
  // A compactattn_dtype.
  int32_t dtype;
  // Dimensions, 1..4.
  int32_t ndim;
  // A compactattn_device_kind.
  int32_t device_kind;
  // Which device of that kind; 0 for the CPU.
  int32_t device_ordinal;
} compactattn_tensor;

// One step's requests: prefill chunks and decode rows, ragged, in one packed q.
//
// Request r owns queries cu_seqlens_q[r]..cu_seqlens_q[r+1], the last of its seq_lens[r] KV tokens (bottom-right
// causal). The chunk's KV is in the pool already. NHD, HND, interleaved and contiguous caches differ in strides only.
typedef struct compactattn_batch {
  // sizeof(compactattn_batch).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [total_q, num_q_heads, head_dim], the plan's dtype.
  struct compactattn_tensor q;
  // [num_pages, page_size, num_kv_heads, head_dim], the plan's kv_dtype.
  struct compactattn_tensor k;
  // As k.
  struct compactattn_tensor v;
  // [num_reqs + 1] int32: from 0, not decreasing, ending at total_q.
  struct compactattn_tensor cu_seqlens_q;
  // [num_reqs] int32: KV tokens including this chunk.
  struct compactattn_tensor seq_lens;
  // [num_reqs, width] int32 page ids; entries after a row's ceil(seq_len / page_size) are never read.
  struct compactattn_tensor block_table;
  // CUDA: the stream of a stage called by itself (forward and attend take theirs from their arguments). NULL on a
  // CPU context.
  void *stream;
  // CUDA: workspace of select, union and table_build, as in compactattn_forward_args. Ignored on a CPU context.
  void *workspace;
  // Bytes of workspace.
  int64_t workspace_bytes;
  // Of an e4m3 cache: what stored keys are multiplied by, [1] or [num_kv_heads] f32, finite and > 0; none = 1. In the
  // context's memory, read when the step runs: of a CUDA context on the device, where values are not checked.
  struct compactattn_tensor k_scale;
  // As k_scale, of values.
  struct compactattn_tensor v_scale;
} compactattn_batch;

// Mean key (and value) of every whole block, kept by the caller beside the pool.
typedef struct compactattn_summaries {
  // sizeof(compactattn_summaries).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [num_pages, summary_slots_per_page, num_kv_heads, head_dim] f32, contiguous.
  struct compactattn_tensor k_mean;
  // As k_mean; needed for mean_correction only, else it may be none.
  struct compactattn_tensor v_mean;
  // [num_pages, summary_slots_per_page, num_kv_heads, 2] u32, contiguous, zeros at first: of which keys each summary
  // is. With it, every call that reads summaries first writes those anew whose keys have changed, so none is ever
  // stale, whoever wrote the pages; k_mean, v_mean and seals are outputs of such a call then. Scales are not keys: where
  // k_scale or v_scale changes, update COMPACTATTN_WHICH_ALL. None = the caller sees to it that
  // compactattn_summaries_update follows every KV write.
  struct compactattn_tensor seals;
} compactattn_summaries;

// What select found: scores, masks or both. Rows are select spans, at most select_rows of compactattn_sizes.
typedef struct compactattn_selection {
  // sizeof(compactattn_selection).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [select spans or more, num_q_heads, max_blocks] f32, contiguous; higher = keep sooner.
  struct compactattn_tensor scores;
  // [select spans or more, num_q_heads, mask_words] u32, contiguous: bit j % 32 of word j / 32 is block j.
  struct compactattn_tensor masks;
} compactattn_selection;

// Lists of physical boxes; a row is one list of one span. Entry page * boxes_per_page + part names box_tokens tokens.
typedef struct compactattn_table {
  // sizeof(compactattn_table).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [list rows or more] int32: boxes of a row.
  struct compactattn_tensor counts;
  // [list rows or more] int32: KV tokens in those boxes; the last one may be partial.
  struct compactattn_tensor stream_lens;
  // [list rows or more, max_boxes] int32, contiguous.
  struct compactattn_tensor boxes;
} compactattn_table;

// Lists as padded tables of whole pages (FlashAttention's block_table and seqused_k).
typedef struct compactattn_padded {
  // sizeof(compactattn_padded).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [list rows or more] int32: pages of a row.
  struct compactattn_tensor counts;
  // [list rows or more] int32: KV tokens in those pages.
  struct compactattn_tensor seq_lens;
  // [list rows or more, width] int32, contiguous; entries after a row's count become 0.
  struct compactattn_tensor pages;
} compactattn_padded;

// Lists as CSR tables of whole pages (FlashInfer's indptr, indices and last_page_len).
typedef struct compactattn_csr {
  // sizeof(compactattn_csr).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [list rows + 1 or more] int32.
  struct compactattn_tensor indptr;
  // [entries or more] int32.
  struct compactattn_tensor indices;
  // [list rows or more] int32: tokens in a row's last page; 0 for an empty row.
  struct compactattn_tensor last_page_len;
} compactattn_csr;

// Arguments of compactattn_attend.
typedef struct compactattn_attend_args {
  // sizeof(compactattn_attend_args).
  uint32_t struct_size;
  // The layer.
  int32_t layer;
  // The step.
  const struct compactattn_batch *batch;
  // What to read: checked entry by entry.
  const struct compactattn_table *table;
  // For mean correction: the lists that table was built from, and summaries with v_mean, which are read as they are.
  // Both or neither; on CUDA for layers with mean_correction, whose workspace has room for it.
  const struct compactattn_tensor *lists;
  // See lists.
  const struct compactattn_summaries *summaries;
  // As in compactattn_forward_args.
  struct compactattn_tensor out;
  // As in compactattn_forward_args.
  struct compactattn_tensor lse;
  // As in compactattn_forward_args.
  void *workspace;
  // Bytes of workspace.
  int64_t workspace_bytes;
  // The CUDA stream; NULL on a CPU context.
  void *stream;
} compactattn_attend_args;

// Arguments of compactattn_forward.
typedef struct compactattn_forward_args {
  // sizeof(compactattn_forward_args).
  uint32_t struct_size;
  // The layer: picks settings and statistics.
  int32_t layer;
  // The step.
  const struct compactattn_batch *batch;
  // Block means kept by the caller; NULL = made anew in this call where the selector needs them.
  const struct compactattn_summaries *summaries;
  // For selector external: scores or masks, not both. NULL otherwise.
  const struct compactattn_selection *external;
  // Settings of this call; NULL = the plan's. compactattn_plan_sizes tells the workspace they need.
  const struct compactattn_settings *settings;
  // [total_q, num_q_heads, head_dim], q's dtype; overlaps nothing else.
  struct compactattn_tensor out;
  // Optional [num_q_heads, total_q] f32, natural logarithm; a row that sees nothing gets -inf and out 0.
  struct compactattn_tensor lse;
  // workspace_bytes of compactattn_sizes, aligned to workspace_alignment; contents mean nothing.
  void *workspace;
  // Bytes of workspace.
  int64_t workspace_bytes;
  // The CUDA stream; NULL on a CPU context.
  void *stream;
} compactattn_forward_args;

// Arguments of compactattn_combine: two results over disjoint KV, and where their union goes.
typedef struct compactattn_combine_args {
  // sizeof(compactattn_combine_args).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // [total_q, num_q_heads, head_dim], the plan's dtype.
  struct compactattn_tensor out_a;
  // [num_q_heads, total_q] f32.
  struct compactattn_tensor lse_a;
  // As out_a.
  struct compactattn_tensor out_b;
  // As lse_a.
  struct compactattn_tensor lse_b;
  // As out_a; overlaps nothing else.
  struct compactattn_tensor out;
  // As lse_a, optional; overlaps nothing else.
  struct compactattn_tensor lse;
  // The CUDA stream; NULL on a CPU context.
  void *stream;
} compactattn_combine_args;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Copies the text of this thread's last failed call into buf, cut to cap bytes and ended by NUL: status name,
// argument, what was wanted, what came. ASCII, at most 300 bytes, no addresses, no tensor contents.
//
// Returns the length of the whole text without the NUL; 0 if no call on this thread has failed. A call that
// succeeds leaves the text as it is.
//
// Memory:
// buf: NULL, or writable for cap bytes.
size_t compactattn_last_error(char *buf, size_t cap);

// The name of a compactattn_status without its prefix: "E_SHAPE". Static; never NULL.
const char *compactattn_status_string(int status);

// The library's version: major << 24 | minor << 16 | patch << 8.
uint32_t compactattn_version(void);

// The library's ABI; a caller built with another COMPACTATTN_ABI_VERSION is refused by compactattn_context_create.
uint32_t compactattn_abi_version(void);

// Copies one line on how the library was built into buf, as compactattn_last_error does.
//
// Memory:
// buf: NULL, or writable for cap bytes.
size_t compactattn_build_info(char *buf, size_t cap);

// Makes a context for one device. out_context is set only on COMPACTATTN_OK.
//
// Contexts and plans may be used by any number of threads at once; destroying one that is in use is safe.
// COMPACTATTN_E_ABI for a caller built for another ABI; COMPACTATTN_E_NO_DRIVER or COMPACTATTN_E_NOT_BUILT for CUDA
// where it cannot be served.
//
// Memory:
// desc: NULL, or readable for its struct_size bytes. out_context: NULL, or writable. NULL is refused, not followed.
compactattn_status compactattn_context_create(const struct compactattn_context_desc *desc,
                                              struct compactattn_context **out_context);

// Destroys a context; its plans live on. NULL is fine. COMPACTATTN_E_HANDLE for one that is not alive.
compactattn_status compactattn_context_destroy(struct compactattn_context *context);

// Fills out with the settings a selector is published (or, for ours, measured) with.
//
// Set out->struct_size before the call.
//
// Memory:
// out: NULL, or readable and writable for its struct_size bytes.
compactattn_status compactattn_settings_init(int32_t selector, struct compactattn_settings *out);

// Fills out with the settings of a compactattn_mode. Set out->struct_size before the call.
//
// Memory:
// out: NULL, or readable and writable for its struct_size bytes.
compactattn_status compactattn_settings_from_mode(int32_t mode, struct compactattn_settings *out);

// Fills out with what COMPACTATTN_MODE and the file COMPACTATTN_CONFIG names ask for in one layer.
//
// layer -1 means: any layer the file does not name. Set out->struct_size before the call. What else
// this library reads of the environment (COMPACTATTN_CHECK, _LIBCUDA, _NVTX) selects nothing.
// COMPACTATTN_E_CONFIG or COMPACTATTN_E_IO where it cannot be understood.
//
// Memory:
// out: NULL, or readable and writable for its struct_size bytes. No other thread changes the environment meanwhile.
compactattn_status compactattn_settings_from_env(int32_t layer,
                                                 struct compactattn_settings *out);

// Makes a plan: checks shapes and settings once for all steps. out_plan is set only on COMPACTATTN_OK.
//
// Memory:
// desc: NULL, or readable for its struct_size bytes, with pointers as its fields say. out_plan: NULL, or writable.
// NULL is refused, not followed.
compactattn_status compactattn_plan_create(const struct compactattn_context *context,
                                           const struct compactattn_plan_desc *desc,
                                           struct compactattn_plan **out_plan);

// Destroys a plan; calls that are running on it end as if it were alive. NULL is fine. COMPACTATTN_E_HANDLE for one
// that is not alive. On CUDA a graph captured with the plan must not be replayed after, and no stream of the process
// may be capturing in global mode meanwhile, nor while contexts and plans are made: the driver forbids both.
compactattn_status compactattn_plan_destroy(struct compactattn_plan *plan);

// The status compactattn_plan_create would end in, with the reason in words (empty on COMPACTATTN_OK), so that an
// engine can fall back before anything runs.
//
// reason is cut to cap bytes and ended by NUL; NULL is fine.
//
// Memory:
// desc as for compactattn_plan_create. reason: NULL, or writable for cap bytes.
compactattn_status compactattn_supports(const struct compactattn_context *context,
                                        const struct compactattn_plan_desc *desc,
                                        char *reason,
                                        size_t cap);

// How large the buffers of one layer are, under the plan's settings or (settings not NULL) those of a single call.
//
// Set out->struct_size before the call. Sizes grow with each limit of the plan, so asking once is enough.
//
// Memory:
// settings: NULL, or readable for its struct_size bytes. out: NULL, or readable and writable for its own.
compactattn_status compactattn_plan_sizes(const struct compactattn_plan *plan,
                                          int32_t layer,
                                          const struct compactattn_settings *settings,
                                          struct compactattn_sizes *out);

// Bytes of k_mean (and as many of v_mean) that one layer's summaries need for a pool of num_pages.
//
// Memory:
// out_bytes: NULL, or writable.
compactattn_status compactattn_summary_bytes(const struct compactattn_plan *plan,
                                             int32_t layer,
                                             int64_t num_pages,
                                             int64_t *out_bytes);

// What one layer (-1 = all layers together) has selected since the plan was made.
//
// Set out->struct_size before the call. Calls on other threads may be half counted.
//
// Memory:
// out: NULL, or readable and writable for its struct_size bytes.
compactattn_status compactattn_plan_stats(const struct compactattn_plan *plan,
                                          int32_t layer,
                                          struct compactattn_stats *out);

// Writes block means of a compactattn_which into the caller's summaries; call it after the step's KV is written.
//
// Memory:
// batch, summaries: NULL, or readable for their struct_size bytes, with tensors as they say; nobody else writes to
// those, or reads the summaries, during the call. The same goes for every function below.
compactattn_status compactattn_summaries_update(const struct compactattn_plan *plan,
                                                int32_t layer,
                                                const struct compactattn_batch *batch,
                                                int32_t which,
                                                const struct compactattn_summaries *summaries);

// Scores every past block into out->scores; keeps blocks row by row into out->masks, if that is given.
//
// summaries may be NULL for selectors that read no block means. Scores of blocks in the open region, and of spans
// that are dense by policy, are left as they are.
//
// Memory:
// As compactattn_summaries_update.
compactattn_status compactattn_select(const struct compactattn_plan *plan,
                                      int32_t layer,
                                      const struct compactattn_batch *batch,
                                      const struct compactattn_summaries *summaries,
                                      const struct compactattn_selection *out);

// Unites scores or masks (one of them, not both) into lists [list rows or more, mask_words] u32, contiguous.
//
// out_rows, if not NULL, becomes the list rows of this batch; on CUDA, where lengths are on the device, the most that
// such a batch can have, and rows after its own are left as they are.
//
// Memory:
// As compactattn_summaries_update. lists: NULL, or readable. out_rows: NULL, or writable.
compactattn_status compactattn_union(const struct compactattn_plan *plan,
                                     int32_t layer,
                                     const struct compactattn_batch *batch,
                                     const struct compactattn_selection *selection,
                                     const struct compactattn_tensor *lists,
                                     int64_t *out_rows);

// Turns lists into rows of physical boxes, through the engine's block table.
//
// Memory:
// As compactattn_union.
compactattn_status compactattn_table_build(const struct compactattn_plan *plan,
                                           int32_t layer,
                                           const struct compactattn_batch *batch,
                                           const struct compactattn_tensor *lists,
                                           const struct compactattn_table *table);

// Turns lists into padded tables of whole engine pages; every page with a selected token, ascending, the chunk last.
//
// On CUDA, where lengths are on the device, the tables need room for the most rows that such a batch can have, and for
// as many pages as its block table is wide (or max_kv_len holds); rows after its own become empty.
//
// Memory:
// As compactattn_union.
compactattn_status compactattn_table_export_padded(const struct compactattn_plan *plan,
                                                   int32_t layer,
                                                   const struct compactattn_batch *batch,
                                                   const struct compactattn_tensor *lists,
                                                   const struct compactattn_padded *padded);

// Turns lists into CSR tables of whole engine pages. out_entries, if not NULL, becomes the entries of indices.
//
// On CUDA as compactattn_table_export_padded, and out_entries becomes the most entries that such a batch can have.
//
// Memory:
// As compactattn_union. out_entries: NULL, or writable.
compactattn_status compactattn_table_export_csr(const struct compactattn_plan *plan,
                                                int32_t layer,
                                                const struct compactattn_batch *batch,
                                                const struct compactattn_tensor *lists,
                                                const struct compactattn_csr *csr,
                                                int64_t *out_entries);

// Attends every query of the batch to the boxes its list names, and combines: the last stages of a step.
//
// Memory:
// args: NULL, or readable for its struct_size bytes, with pointers and tensors as its fields say; nobody else writes
// to those, or reads the outputs or the workspace, during the call.
compactattn_status compactattn_attend(const struct compactattn_plan *plan,
                                      const struct compactattn_attend_args *args);

// One layer of one step: select, union, table, attend, combine; counts into the layer's statistics.
//
// No requests, or no queries: COMPACTATTN_OK, and nothing is written. On any other status nothing was written
// either. Threads may call it on one plan at once, each with a workspace of its own.
//
// Memory:
// As compactattn_attend.
compactattn_status compactattn_forward(const struct compactattn_plan *plan,
                                       const struct compactattn_forward_args *args);

// Merges two results of the same queries over disjoint KV, weighted by their lse; for prefix and suffix, or for ranks
// that hold parts of the context.
//
// Memory:
// As compactattn_attend.
compactattn_status compactattn_combine(const struct compactattn_plan *plan,
                                       const struct compactattn_combine_args *args);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* COMPACTATTN_H */
