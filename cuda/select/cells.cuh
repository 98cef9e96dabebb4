// Cells: log2 of the softmax weight of one sampled query row over one KV block, in f32 (twin of
// rust/select/cells.rs, where a cell is a maximum and a sum).
//
// Rows of a tile are numbered head by head: row g * tokens + i is sampled token i of the group's
// head g. A cell is -inf where its row sees nothing of the block and NaN where a key is NaN.
#pragma once

#include <cfloat>
#include <cmath>

#include "common.cuh"

namespace compactattn::select {

constexpr int kThreads = 128;
constexpr int kMaxRows = 128;  // of a tile

// Which of a span's sampled tokens a tile holds.
struct Samples {
  int count;   // of the span
  int first;   // of the tile
  int tokens;  // of the tile; none: nothing to do
};

__device__ __forceinline__ Samples samples_of(const Step& step, const Span& span, int tile) {
  const int wanted = step.settings.sample_rows;
  const int each = max(1, kMaxRows / step.layout.group_size);
  Samples samples;
  samples.count = wanted == 0 ? span.len : min(wanted, span.len);
  samples.first = tile * each;
  samples.tokens = min(each, samples.count - samples.first);
  return samples;
}

// How many of a span's samples are unusual ones, and its last tokens; the others are even
// (rust/select/sample.rs).
__device__ __forceinline__ int unusual_of(int count) { return min(count / 4, 512); }
__device__ __forceinline__ int last_of(int count) { return count / 8; }

// Tokens of the samples of one (select span, KV head), ascending: [sample_rows], by sample_rows.cu;
// not written where all tokens are samples.
__device__ __forceinline__ int* samples_at(const Step& step, int span, int kv_head) {
  const int64_t unit = static_cast<int64_t>(span) * step.layout.num_kv_heads + kv_head;
  return step.stages.samples + unit * step.settings.sample_rows;
}

// Token of sample `i`, given its (select span, KV head)'s.
__device__ __forceinline__ int sampled_token(const Span& span, const int* tokens, int count,
                                             int i) {
  return count == span.len ? i : tokens[i];
}

// The same without a look at those whose first and last are known: of two or more the span's own
// (rust/select/sample.rs). So a tile of all samples needs none of them.
__device__ __forceinline__ int token_of(const Span& span, const int* tokens, int count, int i) {
  if (i == count - 1) return span.len - 1;
  return i == 0 ? 0 : sampled_token(span, tokens, count, i);
}

// Whether spans can be read before the kernel before this one is done: it is sample_rows.cu, which
// writes tokens alone and lets this one start once it sees what came before it. Those tokens are
// not needed where one tile holds them all.
__device__ __forceinline__ bool knows_spans(const Step& step) {
  const int rows = step.settings.sample_rows;
  return rows > 0 && rows <= max(1, kMaxRows / step.layout.group_size);
}

// The span a CTA works on, or null where it has no scores.
__device__ __forceinline__ const Span* scored_span(const Step& step, int index) {
  if (index >= step.stages.counters->num_select_spans) return nullptr;
  const Span* span = step.stages.select_spans + index;
  return span->dense || past_blocks(step.layout, *span) == 0 ? nullptr : span;
}

// Cells of one (select span, KV head): [kMaxRows, max_blocks].
__device__ __forceinline__ float* cells_of(const Step& step, int span, int kv_head) {
  const int64_t unit = static_cast<int64_t>(span) * step.layout.num_kv_heads + kv_head;
  return step.stages.cells + unit * kMaxRows * step.layout.max_blocks;
}

// Blocks to score again, one bit each, of one (select span, KV head): [mask_words], after all
// cells.
__device__ __forceinline__ uint32_t* candidates_of(const Step& step, int span, int kv_head) {
  const int64_t unit = static_cast<int64_t>(span) * step.layout.num_kv_heads + kv_head;
  return reinterpret_cast<uint32_t*>(cells_of(step, step.stages.max_select_spans, 0)) +
         unit * step.layout.mask_words;
}

// The same as a list, ascending, of one (select span, KV head): [1 + max_blocks], how many first;
// after all bits.
__device__ __forceinline__ int* candidate_list_of(const Step& step, int span, int kv_head) {
  const int64_t unit = static_cast<int64_t>(span) * step.layout.num_kv_heads + kv_head;
  return reinterpret_cast<int*>(candidates_of(step, step.stages.max_select_spans, 0)) +
         unit * (1 + step.layout.max_blocks);
}

// Sampled rows of one KV head and what they see.
struct Tile {
  Span span;
  Samples samples;
  int select_span;
  int kv_head;
  int rows;
  int least_visible;  // KV tokens that the first sampled token sees
  int kv_end;         // KV tokens that the last one sees
  int blocks;         // that hold those
  float* cells;
};

// Tile `index` of a KV head and a select span, number `span_index`, that has scores; false where
// there is none.
__device__ __forceinline__ bool tile_of(const Step& step, const Span& span, int index,
                                        int span_index, int kv_head, Tile& tile) {
  tile.span = span;
  tile.samples = samples_of(step, tile.span, index);
  const Samples& samples = tile.samples;
  if (samples.tokens <= 0) return false;
  const int last = samples.first + samples.tokens - 1;
  tile.kv_head = kv_head;
  tile.select_span = span_index;
  tile.rows = samples.tokens * step.layout.group_size;
  const int* tokens = samples_at(step, span_index, kv_head);
  tile.least_visible =
      visible(tile.span, token_of(tile.span, tokens, samples.count, samples.first));
  tile.kv_end = visible(tile.span, token_of(tile.span, tokens, samples.count, last));
  const int block_tokens = 1 << step.layout.log2_block_tokens;
  tile.blocks = (tile.kv_end + block_tokens - 1) >> step.layout.log2_block_tokens;
  tile.cells = cells_of(step, span_index, kv_head);
  return true;
}

// The same of any select span.
__device__ __forceinline__ bool tile_at(const Step& step, int index, int span_index, int kv_head,
                                        Tile& tile) {
  const Span* span = scored_span(step, span_index);
  return span && tile_of(step, *span, index, span_index, kv_head, tile);
}

// The tile of this CTA of a grid (any, KV heads, select spans); false where there is none.
__device__ __forceinline__ bool find_tile(const Step& step, int index, Tile& tile) {
  return tile_at(step, index, blockIdx.z, blockIdx.y, tile);
}

// A row of the tile: where its query vector lies and what it sees; rows past the tile's have none
// and see nothing.
struct Row {
  const char* query;
  int seen;  // KV tokens
};

__device__ __forceinline__ Row row_at(const Step& step, const Tile& tile, int index) {
  if (index >= tile.rows) return {nullptr, 0};
  const Batch& batch = step.batch;
  const int head = tile.kv_head * step.layout.group_size + index / tile.samples.tokens;
  const int i = tile.samples.first + index % tile.samples.tokens;
  const int* tokens = samples_at(step, tile.select_span, tile.kv_head);
  const int token = sampled_token(tile.span, tokens, tile.samples.count, i);
  const int64_t offset =
      (tile.span.q_start + token) * batch.q_token_stride + head * batch.q_head_stride;
  return {static_cast<const char*>(batch.q) + 2 * offset, visible(tile.span, token)};
}

// Starts the copy of the tile's query vectors to `shared`, zeros up to a whole warp's rows, and
// writes what each row sees. Every thread looks one row up: no look-up waits for another.
__device__ __forceinline__ void load_rows(const Step& step, const Tile& tile, uint32_t shared,
                                          int (&seen)[kMaxRows]) {
  static_assert(kThreads == kMaxRows, "a row a thread");
  __shared__ const char* queries[kMaxRows];
  const Row mine = row_at(step, tile, threadIdx.x);
  queries[threadIdx.x] = mine.query;
  seen[threadIdx.x] = mine.seen;
  __syncthreads();
  for (int i = threadIdx.x / kLanesPerVector; i < kMaxRows; i += kThreads / kLanesPerVector) {
    const bool wanted = queries[i] != nullptr;
    const char* query = wanted ? queries[i] : static_cast<const char*>(step.batch.q);
    copy_vector(shared, i, query, wanted, step.layout);
  }
}

}  // namespace compactattn::select
