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
constexpr int kWarpRows = 32;
constexpr int kTileKeys = 64;
constexpr int kStages = 2;  // tiles of keys in shared memory; three CTAs on an SM hide the rest

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

// Token of sample `i`: evenly strided from the span's first to its last; a single one is the last.
__device__ __forceinline__ int sampled_token(const Span& span, int count, int i) {
  if (count == span.len) return i;
  if (count == 1) return span.len - 1;
  return static_cast<int>(static_cast<int64_t>(i) * (span.len - 1) / (count - 1));
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

// Sampled rows of one KV head and what they see.
struct Tile {
  Span span;
  Samples samples;
  int kv_head;
  int rows;
  int least_visible;  // KV tokens that the first sampled token sees
  int kv_end;         // KV tokens that the last one sees
  int blocks;         // that hold those
  float* cells;
};

// The tile of this CTA of a grid (any, KV heads, select spans); false where there is none.
__device__ __forceinline__ bool find_tile(const Step& step, int index, Tile& tile) {
  const Span* span = scored_span(step, blockIdx.z);
  if (!span) return false;
  tile.span = *span;
  tile.samples = samples_of(step, tile.span, index);
  const Samples& samples = tile.samples;
  if (samples.tokens <= 0) return false;
  const int last = samples.first + samples.tokens - 1;
  tile.kv_head = blockIdx.y;
  tile.rows = samples.tokens * step.layout.group_size;
  tile.least_visible = visible(tile.span, sampled_token(tile.span, samples.count, samples.first));
  tile.kv_end = visible(tile.span, sampled_token(tile.span, samples.count, last));
  const int block_tokens = 1 << step.layout.log2_block_tokens;
  tile.blocks = (tile.kv_end + block_tokens - 1) >> step.layout.log2_block_tokens;
  tile.cells = cells_of(step, blockIdx.z, tile.kv_head);
  return true;
}

// Starts the copy of the tile's query vectors to `shared`, zeros up to a whole warp's rows, and
// writes what each row sees.
__device__ __forceinline__ void load_rows(const Step& step, const Tile& tile, uint32_t shared,
                                          int (&seen)[kMaxRows]) {
  const Batch& batch = step.batch;
  const int first_head = tile.kv_head * step.layout.group_size;
  for (int row = threadIdx.x / kLanesPerVector; row < kMaxRows; row += kThreads / kLanesPerVector) {
    const bool wanted = row < tile.rows;
    const int head = wanted ? row / tile.samples.tokens : 0;
    const int i = tile.samples.first + (wanted ? row % tile.samples.tokens : 0);
    const int token = sampled_token(tile.span, tile.samples.count, i);
    const int64_t offset = (tile.span.q_start + token) * batch.q_token_stride +
                           (first_head + head) * batch.q_head_stride;
    copy_vector(shared, row, static_cast<const char*>(batch.q) + 2 * offset, wanted, step.layout);
    if (threadIdx.x % kLanesPerVector == 0) seen[row] = wanted ? visible(tile.span, token) : 0;
  }
}

// Row of the tile that element pair `r` (0..3) of this lane's fragments belongs to.
__device__ __forceinline__ int fragment_row(int r) {
  return threadIdx.x / 32 * kWarpRows + r / 2 * 16 + r % 2 * 8 + threadIdx.x % 32 / 4;
}

// Weight of some columns of this lane's 4 rows: sum * 2^max.
struct Partial {
  float max[4];
  float sum[4];

  // The maximum starts at the lowest finite number: a row that sees nothing gets a sum of 0.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 4; ++r) max[r] = -FLT_MAX, sum[r] = 0.0f;
  }
};

// Reads blocks of keys into cells. A Source says which: `count`, `block(i)`, ascending in i, and
// `writes(seen, start, end)`, whether a row that sees `seen` tokens gets a cell of the block of
// tokens start..end.
template <class Element, class Source>
struct Reader {
  const Step& step;
  const Tile& tile;
  const Source& source;
  PagedKeys keys;
  uint32_t queries;  // tile of rows in shared memory; the stages follow
  int seen[4];

  __device__ __forceinline__ Reader(const Step& step, const Tile& tile, const Source& source,
                                    uint32_t queries, const int (&seen_by)[kMaxRows])
      : step(step),
        tile(tile),
        source(source),
        keys(step, tile.span.req, tile.kv_head),
        queries(queries) {
#pragma unroll
    for (int r = 0; r < 4; ++r) seen[r] = seen_by[fragment_row(r)];
  }

  __device__ __forceinline__ int log2_block() const { return step.layout.log2_block_tokens; }

  __device__ __forceinline__ uint32_t stage(int t) const {
    return queries + (kMaxRows + t % kStages * kTileKeys) * pitch_of(step.layout);
  }

  // KV token of the source's token `i`; past the end for those of no block.
  __device__ __forceinline__ int token_at(int i) const {
    const int index = i >> log2_block();
    if (index >= source.count) return tile.kv_end;
    return (source.block(index) << log2_block()) + (i & ((1 << log2_block()) - 1));
  }

  __device__ __forceinline__ void load(int t) const {
    for (int row = threadIdx.x / kLanesPerVector; row < kTileKeys;
         row += kThreads / kLanesPerVector) {
      const int token = token_at(t * kTileKeys + row);
      const bool wanted = token < tile.kv_end;
      copy_vector(stage(t), row, wanted ? keys.at(token) : keys.base, wanted, step.layout);
    }
  }

  // Fills the cells of the source's blocks; called by the whole CTA.
  __device__ __forceinline__ void run() {
    const int tiles = ((source.count << log2_block()) + kTileKeys - 1) / kTileKeys;
    if (tiles > 0) load(0);
    ptx::copy_async_commit();
    Partial partial;
    partial.clear();
    for (int t = 0; t < tiles; ++t) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      if (t + 1 < tiles) load(t + 1);
      ptx::copy_async_commit();
      if (static_cast<int>(threadIdx.x) / 32 * kWarpRows < tile.rows) fold_tile(t, partial);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void fold_tile(int t, Partial& partial) const {
    float logits[2][kTileKeys / 8][4] = {};
    const uint32_t rows = threadIdx.x / 32 * kWarpRows * pitch_of(step.layout);
    multiply<Element, kTileKeys / 8>(logits, queries + rows, stage(t), step.layout);
    if (log2_block() == 4) {
      fold<2>(logits, t * kTileKeys, partial);
    } else if (log2_block() == 5) {
      fold<4>(logits, t * kTileKeys, partial);
    } else {
      fold<8>(logits, t * kTileKeys, partial);
    }
  }

  // Adds columns to `partial`, kTiles * 8 at a time, and writes the cell where a block ends.
  template <int kTiles>
  __device__ __forceinline__ void fold(float (&logits)[2][kTileKeys / 8][4], int first,
                                       Partial& partial) const {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; n += kTiles) {
      const int i = first + 8 * n, end = i + 8 * kTiles;
      if (i >> log2_block() >= source.count) return;
      const int token = token_at(i);
      if (token + 8 * kTiles > tile.least_visible) hide<kTiles>(logits, n, token);
      add<kTiles>(logits, n, partial);
      if ((end & ((1 << log2_block()) - 1)) == 0) {
        write(partial, source.block(i >> log2_block()));
        partial.clear();
      }
    }
  }

  // Tokens from `token` on that a row does not see weigh nothing, whatever is stored there.
  template <int kTiles>
  __device__ __forceinline__ void hide(float (&logits)[2][kTileKeys / 8][4], int from,
                                       int token) const {
    token += threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& x = logits[e / 4][from + n][e % 4];
        if (token + 8 * n + e % 2 >= seen[e / 2]) x = -INFINITY;
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void add(const float (&logits)[2][kTileKeys / 8][4], int from,
                                      Partial& partial) const {
    const float scale = step.layout.sm_scale * kLog2E;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n) {
        top = fmaxf(top, logits[r / 2][from + n / 2][r % 2 * 2 + n % 2]);
      }
      top = fmaxf(partial.max[r], top * scale);
      // Two sums: half the length of the chain of additions.
      float even = partial.sum[r] * ptx::exp2_approx(partial.max[r] - top), odd = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float (&x)[4] = logits[r / 2][from + n];
        even += ptx::exp2_approx(fmaf(x[r % 2 * 2], scale, -top));
        odd += ptx::exp2_approx(fmaf(x[r % 2 * 2 + 1], scale, -top));
      }
      partial.max[r] = top;
      partial.sum[r] = even + odd;
    }
  }

  __device__ __forceinline__ void write(const Partial& partial, int block) const {
    const int start = block << log2_block(), end = (block + 1) << log2_block();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float top = quad_max(partial.max[r]);
      const float sum = quad_sum(partial.sum[r] * ptx::exp2_approx(partial.max[r] - top));
      const int row = fragment_row(r);
      if (threadIdx.x % 4 == 0 && row < tile.rows && source.writes(seen[r], start, end)) {
        tile.cells[static_cast<int64_t>(row) * step.layout.max_blocks + block] =
            top + ptx::log2_approx(sum);
      }
    }
  }
};

// This CTA's even share of `count` blocks: a whole number of tiles of keys, `kLeastTiles` or more.
struct Share {
  int first;
  int count;

  static constexpr int kLeastTiles = 4;  // fewer do not repay loading the rows

  __device__ __forceinline__ Share(const Layout& layout, int count, int part, int parts) {
    const int per_tile = max(1, kTileKeys >> layout.log2_block_tokens);
    const int tile_blocks = max(1, (kLeastTiles * kTileKeys) >> layout.log2_block_tokens);
    const int even = (count + parts - 1) / parts;
    const int each = max(tile_blocks, (even + per_tile - 1) / per_tile * per_tile);
    first = part * each;
    this->count = min(each, count - first);
  }
};

// Consecutive blocks, every cell.
struct BlockRange {
  int first;
  int count;
  __device__ __forceinline__ int block(int i) const { return first + i; }
  __device__ __forceinline__ bool writes(int, int, int) const { return true; }
};

}  // namespace compactattn::select
