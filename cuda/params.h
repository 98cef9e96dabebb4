// What the host hands to the GPU stages: plain data with fixed sizes, mirrored in
// rust/cuda/params.rs and tests/gpu/params.py. All pointers are device memory unless said
// otherwise; strides count elements.
#pragma once

#include <cstdint>

namespace compactattn {

// ---- one step, as the engine describes it ----

// An element of an e4m3 cache.
struct E4m3 {
  uint8_t code;
};

// Request r owns queries cu_seqlens_q[r] .. cu_seqlens_q[r + 1], the last of its seq_lens[r] KV
// tokens (bottom-right causal). Lengths and tables are device memory and may change between replays
// of a graph; extents may not.
struct Batch {
  const void* q;                // [total_q, num_q_heads, head_dim]
  const void* k;                // [num_pages, page, num_kv_heads, head_dim]
  const void* v;                // as k
  const int32_t* cu_seqlens_q;  // [num_reqs + 1]
  const int32_t* seq_lens;      // [num_reqs]
  const int32_t* block_table;   // [num_reqs, table_width] by table_stride
  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t k_page_stride;
  int64_t k_token_stride;
  int64_t k_head_stride;
  int64_t v_page_stride;
  int64_t v_token_stride;
  int64_t v_head_stride;
  int64_t table_stride;
  int32_t table_width;
  int32_t num_reqs;
  int32_t total_q;
  int32_t num_pages;
  const float* k_scale;  // of an e4m3 pool: what stored keys are multiplied by, one or one for each
                         // KV head; null: 1
  const float* v_scale;  // as k_scale, of values
  int32_t k_scale_stride;  // from a KV head's to the next; 0: one for all
  int32_t v_scale_stride;
};
static_assert(sizeof(Batch) == 160, "host code writes this layout");

// How a layer cuts a step. Rows of scores and bits are laid out by the maxima.
struct Layout {
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t group_size;  // num_q_heads / num_kv_heads, 1..64
  int32_t head_dim;    // 64, 96, 128 or 256
  int32_t log2_page_tokens;
  int32_t log2_block_tokens;
  int32_t log2_box_tokens;  // of min(page, block)
  int32_t heads_per_list;   // 1..group_size
  int32_t
      lists_per_kv_head;  // ceil(group_size / heads_per_list): the last list may serve fewer heads
  int32_t list_span;      // query tokens that share lists; 0 = the whole chunk
  int32_t select_span;    // query tokens that share rows of scores; 0 = the whole chunk
  int32_t max_kv_len;     // longer requests are refused
  int32_t max_blocks;     // stride of a row of scores
  int32_t mask_words;     // stride of a row of bits
  int32_t max_boxes;      // stride of a row of boxes
  float sm_scale;         // on q . k, before softmax
};
static_assert(sizeof(Layout) == 64, "host code writes this layout");

enum Keep : int32_t { kThreshold = 0, kMass = 1, kDensity = 2 };

// What to keep (rust/settings.rs says what each number means).
struct Settings {
  int32_t all_dense;  // selector dense
  int32_t dense_below_kv_len;
  int32_t dense_max_q_len;
  int32_t dense_prefix_tokens;
  int32_t keep;  // Keep
  float keep_value;
  float min_density;
  float max_density;
  int32_t keep_at_rows;  // 1: each row of scores decides, then rows are ORed; 0: the list decides
  int32_t merge_max;     // 1: a list's score is its rows' maximum; 0: their mean
  int32_t sink_blocks;
  int32_t local_blocks;
  float density_guard;
  int32_t mass_counts_open;  // kMass: what the scores lack to 1 counts as held
  int32_t min_budget;        // flashprefill, else 0
  int32_t non_voting_spans;  // flashprefill, else 0
  int32_t sample_rows;       // 0 = all
  int32_t relative_to_past;  // flashprefill
  int32_t xattention_stride;
  float candidate_share;  // two_level: share of past blocks that are scored again
};
static_assert(sizeof(Settings) == 80, "host code writes this layout");

// ---- what the stages hand to each other ----

// One request, checked. A refused one (a length out of range, a page outside the pool) keeps its
// queries and has no KV: its out is 0 and its lse -inf.
struct Request {
  int32_t q_start;
  int32_t q_len;
  int32_t kv_len;
  int32_t refused;
};
static_assert(sizeof(Request) == 16, "");

// Consecutive query tokens of one request that share lists, or rows of scores.
struct Span {
  int32_t req;
  int32_t first;  // counted from the chunk's first token
  int32_t len;
  int32_t q_start;       // within the packed q
  int32_t kv_end;        // KV tokens that the span's last token sees
  int32_t past;          // KV tokens before the chunk
  int32_t dense;         // attends to everything, whatever the scores
  int32_t votes;         // select spans: its rows count (flashprefill's non_voting_spans)
  int32_t first_select;  // list spans: the first of its select spans
  int32_t num_selects;   // list spans: how many
  int32_t first_item;    // list spans: work items of the spans before it, over all their lists
  int32_t chunk_items;   // list spans: work items of all spans of the chunk
};
static_assert(sizeof(Span) == 48, "");

// Written on device in every step.
struct Counters {
  int32_t num_list_spans;
  int32_t num_select_spans;
  int32_t num_items;
  int32_t refused;  // requests
  int32_t reserved[4];
};
static_assert(sizeof(Counters) == 32, "");

// What calls have selected since the plan was made; in this order also in host memory that the GPU
// can write (`Stages::stats_mirror`).
struct Stats {
  uint64_t calls;
  uint64_t lists;
  uint64_t candidates;
  uint64_t selected;
  uint64_t forced;
  uint64_t guarded;
  uint64_t dense;
  uint64_t refused;
};
static_assert(sizeof(Stats) == 64, "");

// One query tile over one list: `num_tokens` query tokens of the heads that share the list. Row r
// of the tile is query token r / heads_per_list, head r % heads_per_list; heads past `num_heads`
// and tokens past `num_tokens` are not the item's.
struct WorkItem {
  int32_t list_row;      // row of the table
  int32_t kv_head;       // head of the KV pool that the list reads
  int32_t q_token;       // first query token, counted over the whole batch
  int32_t num_tokens;    // 1 .. 128 / heads_per_list
  int32_t q_head;        // first of the heads
  int32_t tokens_after;  // tokens of the list's span after `q_token`: it sees stream_len -
                         // tokens_after columns
  int32_t num_heads;     // 1 .. heads_per_list
  int32_t stream_len;    // KV tokens of the list, no more than its boxes hold
};
static_assert(sizeof(WorkItem) == 32, "");

// One walk of one CTA of attend: tiles of an item, from the tile before `end` down to `begin`. An
// item's parts are done by as many CTAs one after the other, its last tiles by the first of them.
struct Piece {
  int32_t item;
  int32_t begin;
  int32_t end;
  int16_t part;
  int16_t parts;  // 1: the piece is the whole item
};
static_assert(sizeof(Piece) == 16, "");

constexpr int32_t kArrivals = 8;  // that are counted where two CTAs' shares meet: of 16 rows each

// Buffers of one call, all but summaries and stats in its workspace.
struct Stages {
  Counters* counters;
  Request* requests;     // [num_reqs]
  Span* list_spans;      // [max_list_spans]
  Span* select_spans;    // [max_select_spans]
  float* scores;         // [select spans, num_q_heads, max_blocks]; only past blocks of spans that
                         // are not dense are written or read
  float* cells;          // select's scratch
  int32_t* samples;      // [select spans, num_kv_heads, sample_rows] tokens of a span, ascending
  uint32_t* masks;       // [select spans, num_q_heads, mask_words]
  uint32_t* lists;       // [list spans, lists per span, mask_words]; a list row is (list span, kv
                         // head, part of the group)
  int32_t* counts;       // [list rows] boxes
  int32_t* stream_lens;  // [list rows] KV tokens of those boxes; the last may be partial
  int32_t* boxes;        // [list rows, max_boxes], entry = page * boxes_per_page + part
  WorkItem* items;       // [max_items]
  // [num_ctas + 1, kArrivals] 0 at first: parts that have met before a CTA of attend; before that,
  // by KV head, tiles of keys that CTAs of cells_read have taken (null: they take none).
  int32_t* arrivals;
  Piece* pieces;          // [max_items + num_ctas], CTA by CTA
  int32_t* piece_starts;  // [num_ctas + 1] where a CTA's pieces start
  int32_t* costs;         // [max_items + 1], scratch of plan
  const float* k_mean;    // [num_pages * slots, num_kv_heads, head_dim] (rust/summaries.rs); may be
                          // null
  Stats* stats;           // of the layer
  Stats* stats_mirror;    // host memory
  int32_t max_list_spans;
  int32_t max_select_spans;
  int32_t max_items;
  int32_t num_ctas;     // of attend, 1..1024
  int32_t whole_items;  // 1: cuts fall between items only, so bits do not depend on neighbours
  int32_t reserved;
};
static_assert(sizeof(Stages) == 184, "host code writes this layout");

// The one argument of every stage from batch to plan.
struct Step {
  Batch batch;
  Layout layout;
  Settings settings;
  Stages stages;
};
static_assert(sizeof(Step) == 488, "host code writes this layout");

// ---- attend and combine ----

// The lists and the items that read them.
struct Work {
  const WorkItem* items;
  const Piece* pieces;
  const int32_t* piece_starts;  // [num_ctas + 1]
  const int32_t* boxes;         // [rows, max_boxes]
  int32_t* arrivals;            // [num_ctas + 1, kArrivals]
  int32_t num_ctas;
  int32_t max_boxes;
  int32_t heads_per_list;
  int32_t log2_box_tokens;
};
static_assert(sizeof(Work) == 56, "host code writes this layout");

// Strides of `out` are multiples of 8 and `out` itself is 16-byte aligned.
struct Results {
  void* out;           // [total_q, num_q_heads, head_dim] by the strides below
  float* lse;          // [total_q, num_q_heads] by the strides below, natural log; may be null
  float* partial_out;  // [2 * num_ctas, 128 * head_dim], each part divided by its own sum, in the
                       // order of a warp's accumulators (cuda/combine/meet.cuh)
  float* partial_lse;  // [2 * num_ctas, 128]
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
};
static_assert(sizeof(Results) == 64, "host code writes this layout");

// Everything attend reads but the tensor maps of the sm_90a kernels.
struct AttendParams {
  Work work;
  Results results;
  Batch batch;  // sm_90a kernels use num_pages alone, the first page id outside the pool: the copy
                // engine fills it with zeros
  int32_t log2_box_tokens;  // as in work; sm_90a: at least 3, an atom of the copy's swizzle
  int32_t log2_boxes_per_page;
  float sm_scale;  // on q . k, before softmax
  int32_t reserved;
};
static_assert(sizeof(AttendParams) == 296, "host code writes this layout");

}  // namespace compactattn
