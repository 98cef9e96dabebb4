// Mean correction: what a list leaves out of a run of past blocks still takes part, as one key with
// one and a half times the weight of so many tokens (rust/attend/mod.rs).
//
// A request's means lie in a row, of runs that are read and others, in the type that is multiplied:
// one such row serves every list of its KV head. What a list leaves out of each is counted beside
// it; nothing left out is no weight. A list's means are tiles before those of its stream, so that
// cuts and pieces count both alike.
#pragma once

#include "../ptx/scalar.cuh"
#include "bits.cuh"
#include "work.cuh"

namespace compactattn {

// The argument of kernels that correct, beside their own.
struct Means {
  void* k;           // [max_num_reqs, num_kv_heads, rows, head_dim], q's type, the pool's units;
                     // zeros from a request's last mean to the end of its tile
  void* v;           // as k
  uint8_t* skipped;  // [list rows, rows]: blocks of each run that a list leaves out, see column_at
  const float* k_mean;    // [num_pages * slots, num_kv_heads, head_dim] (rust/summaries.rs)
  const float* v_mean;    // as k_mean
  const Span* spans;      // list spans
  const uint32_t* lists;  // [list rows, mask_words]
  int32_t rows;           // a multiple of kTileTokens
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t lists_per_span;
  int32_t mask_words;
  int32_t log2_block_tokens;
  int32_t log2_blocks;  // of a mean
  int32_t every_span;   // 1: lists are a caller's, and leave out what they like of dense requests
};
static_assert(sizeof(Means) == 88, "host code writes this layout");

// Where a tile's column stands among its counts. A thread's columns, a pair of every eight, lie
// side by side: it reads them in the words of one piece of 32 bytes.
__host__ __device__ constexpr int column_at(int place) {
  return place % 32 / 2 * 8 + place / 32 * 2 + place % 2;
}

// Means of a request with `past` tokens before its span.
__device__ __forceinline__ int means_of(const Means& means, int past) {
  return ((past >> means.log2_block_tokens) + (1 << means.log2_blocks) - 1) >> means.log2_blocks;
}

// What a tile of queries reads of the means.
struct Skipped {
  int req;
  int means;  // 0 where the list reads everything

  // Tiles of `tokens` columns.
  __device__ __forceinline__ int tiles(int tokens) const { return (means + tokens - 1) / tokens; }
};

__device__ __forceinline__ Skipped skipped_by(const Means& means, const WorkItem& item) {
  const Span& span = means.spans[item.list_row / means.lists_per_span];
  // An empty list is one that was found damaged: its queries see nothing, means neither.
  const bool skips = item.stream_len > 0 && item.stream_len < span.kv_end;
  return {span.req, skips ? means_of(means, span.past) : 0};
}

// Counts of the thread's columns of tile `tile` of `tokens`, a byte each.
__device__ __forceinline__ const uint2* skipped_at(const Means& means, int list_row, int tile,
                                                   int tokens) {
  const int column = tile * tokens;
  const int place = column % kTileTokens / 4 + threadIdx.x % 4 * (kTileTokens / 4);
  const int64_t row = static_cast<int64_t>(list_row) * means.rows;
  const uint8_t* at = means.skipped + row + column / kTileTokens * kTileTokens + place;
  return reinterpret_cast<const uint2*>(at);
}

template <int N>
__device__ __forceinline__ void load_skipped(const uint2* from, uint32_t (&counts)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const uint2 words = __ldg(from + i);
    counts[2 * i] = words.x;
    counts[2 * i + 1] = words.y;
  }
}

// Tokens weigh more than so many of their mean, as exp is convex: by how much, rust/types.rs says.
constexpr float kLog2MeanWeight = 0.5849625f;  // of 1.5

// Scores of means, in units that `scale` takes to powers of two: each weighs by the tokens that are
// left out of it.
template <int N>
__device__ __forceinline__ void weigh_means(float (&s)[N], const uint32_t (&counts)[N / 8],
                                            int log2_block_tokens, float scale) {
  const float unit = __fdividef(1.0f, scale);
  const float block = (static_cast<float>(log2_block_tokens) + kLog2MeanWeight) * unit;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float count = static_cast<float>(counts[i] >> 8 * j & 0xff);
      // log2(0) is -inf.
      const float more = ptx::log2_approx(count) * unit + block;
      float* of_rows = s + 8 * i + j / 2 * 4 + j % 2;
      of_rows[0] += more;
      of_rows[2] += more;
    }
  }
}

// From plan's tiles to a kernel's own of `kTokens`: means are tiles 0 .. means, the stream follows.
template <int kTokens, bool kMeans>
struct OwnTiles {
  static constexpr int kParts = kTileTokens / kTokens;
  int means;
  int planned;  // means, in plan's tiles

  static_assert(kTileTokens % kTokens == 0);

  __device__ __forceinline__ explicit OwnTiles(const Skipped& skipped)
      : means(kMeans ? skipped.tiles(kTokens) : 0),
        planned(kMeans ? skipped.tiles(kTileTokens) : 0) {}

  // Where the plan's tile starts; parts of its last tile that hold no mean are left out.
  __device__ __forceinline__ int at(int tile) const {
    return kMeans && tile < planned ? tile * kParts : means + (tile - planned) * kParts;
  }
};

}  // namespace compactattn
