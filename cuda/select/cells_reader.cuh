// Cells from keys: products of a tile of sampled rows with blocks of keys, folded as they come.
#pragma once

#include "cells.cuh"

namespace compactattn::select {

constexpr int kWarpRows = 32;
constexpr int kTileKeys = 64;
constexpr int kStages = 2;  // tiles of keys in shared memory; three CTAs on an SM hide the rest
static_assert((kMaxRows + kStages * kTileKeys) * row_bytes(64) == cells_bytes(64), "a launch's");

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

// Finished cells, until each lane of a quad holds one of each of its rows: four neighbours of a row
// are stored at once, a quarter of the writes to memory.
struct Held {
  float cells[4];
  int block;
  int count;
};

// Reads blocks of keys, which the cache holds as `Stored`, into cells. A Source says which:
// `count`, `block(i)`, ascending in i, and `writes(seen, start, end)`, whether a row that sees
// `seen` tokens gets a cell of the block of tokens start..end.
template <class Element, class Source, class Stored = Element>
struct Reader {
  static constexpr bool kWiden = sizeof(Stored) == 1;
  const Step& step;
  const Tile& tile;
  const Source& source;
  PagedKeys keys;
  uint32_t queries;  // tile of rows in shared memory; the stages follow
  int seen[4];

  __device__ __forceinline__ Reader(const Step& step, const Tile& tile, const Source& source,
                                    uint32_t queries)
      : step(step),
        tile(tile),
        source(source),
        keys(step, tile.span.req, tile.kv_head, sizeof(Stored)),
        queries(queries) {}

  __device__ __forceinline__ void see(const int (&seen_by)[kMaxRows]) {
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
      const char* from = wanted ? keys.at(token) : keys.base;
      if constexpr (kWiden) {
        copy_stored_vector(stage(t), row, from, wanted, step.layout);
      } else {
        copy_vector(stage(t), row, from, wanted, step.layout);
      }
    }
  }

  // What this thread has loaded, once it is there.
  __device__ __forceinline__ void widen(int t) const {
    extern __shared__ __align__(16) char shared_bytes[];
    uint8_t* keys = reinterpret_cast<uint8_t*>(shared_bytes) + (stage(t) - queries);
    for (int row = threadIdx.x / kLanesPerVector; row < kTileKeys;
         row += kThreads / kLanesPerVector) {
      widen_vector<Element>(keys + row * pitch_of(step.layout), step.layout);
    }
  }

  // On q . k as stored, to powers of two.
  __device__ __forceinline__ float scale() const {
    const float scale = step.layout.sm_scale * kLog2E;
    return kWiden ? scale * key_scale(step.batch, tile.kv_head) : scale;
  }

  __device__ __forceinline__ int tiles() const {
    return ((source.count << log2_block()) + kTileKeys - 1) / kTileKeys;
  }

  // Starts the copy of the first keys, which no row has a say in.
  __device__ __forceinline__ void begin() const {
    if (tiles() > 0) load(0);
    ptx::commit_copies();
  }

  // Fills the cells of the source's blocks, given what each row sees, once it has begun; called by
  // the whole CTA.
  __device__ __forceinline__ void run(const int (&seen_by)[kMaxRows]) {
    see(seen_by);
    const int tiles = this->tiles();
    Partial partial;
    partial.clear();
    Held held;
    held.count = 0;
    for (int t = 0; t < tiles; ++t) {
      ptx::wait_copies_but<0>();
      if constexpr (kWiden) widen(t);
      __syncthreads();
      if (t + 1 < tiles) load(t + 1);
      ptx::commit_copies();
      if (static_cast<int>(threadIdx.x) / 32 * kWarpRows < tile.rows) fold_tile(t, partial, held);
    }
    write(held);
    ptx::wait_copies_but<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void fold_tile(int t, Partial& partial, Held& held) const {
    float logits[2][kTileKeys / 8][4] = {};
    const uint32_t rows = threadIdx.x / 32 * kWarpRows * pitch_of(step.layout);
    multiply<Element, kTileKeys / 8>(logits, queries + rows, stage(t), step.layout);
    fold_products(logits, t, partial, held);
  }

  // The products of the tile's keys with this warp's rows.
  __device__ __forceinline__ void fold_products(float (&logits)[2][kTileKeys / 8][4], int t,
                                                Partial& partial, Held& held) const {
    if (log2_block() == 4) {
      fold<2>(logits, t * kTileKeys, partial, held);
    } else if (log2_block() == 5) {
      fold<4>(logits, t * kTileKeys, partial, held);
    } else {
      fold<8>(logits, t * kTileKeys, partial, held);
    }
  }

  // Adds columns to `partial`, kTiles * 8 at a time, and writes the cell where a block ends.
  template <int kTiles>
  __device__ __forceinline__ void fold(float (&logits)[2][kTileKeys / 8][4], int first,
                                       Partial& partial, Held& held) const {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; n += kTiles) {
      const int i = first + 8 * n, end = i + 8 * kTiles;
      if (i >> log2_block() >= source.count) return;
      const int token = token_at(i);
      if (token + 8 * kTiles > tile.least_visible) hide<kTiles>(logits, n, token);
      add<kTiles>(logits, n, partial);
      if ((end & ((1 << log2_block()) - 1)) == 0) {
        finish(partial, source.block(i >> log2_block()), held);
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
    const float scale = this->scale();
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

  __device__ __forceinline__ void finish(Partial& partial, int block, Held& held) const {
    const bool mine = static_cast<int>(threadIdx.x) % 4 == held.count;
    if (mine) held.block = block;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float top = quad_max(partial.max[r]);
      const float sum = quad_sum(partial.sum[r] * ptx::exp2_approx(partial.max[r] - top));
      if (mine) held.cells[r] = top + ptx::log2_approx(sum);
    }
    partial.clear();
    if (++held.count == 4) write(held);
  }

  __device__ __forceinline__ void write(Held& held) const {
    if (static_cast<int>(threadIdx.x) % 4 < held.count) {
      const int start = held.block << log2_block(), end = start + (1 << log2_block());
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = fragment_row(r);
        if (row >= tile.rows || !source.writes(seen[r], start, end)) continue;
        tile.cells[static_cast<int64_t>(row) * step.layout.max_blocks + held.block] = held.cells[r];
      }
    }
    held.count = 0;
  }
};

// This CTA's even share of `count` blocks: a whole number of tiles of keys, `least_tiles` or more.
struct Share {
  int first;
  int count;

  static constexpr int kLeastTiles = 4;  // fewer do not repay loading the rows

  __device__ __forceinline__ Share(const Layout& layout, int count, int part, int parts,
                                   int least_tiles = kLeastTiles) {
    const int per_tile = max(1, kTileKeys >> layout.log2_block_tokens);
    const int tile_blocks = max(1, (least_tiles * kTileKeys) >> layout.log2_block_tokens);
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
