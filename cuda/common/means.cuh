// Mean correction: a past block that a list leaves out still takes part, as one key with the weight
// of its tokens (rust/attend/mod.rs).
//
// A request's means lie in a row, listed blocks and others, in the type that is multiplied: one
// such row serves every list of its KV head, and what a list reads by itself is masked. A list's
// means are tiles before those of its stream, so that cuts and pieces count both alike.
#pragma once

#include "bits.cuh"
#include "work.cuh"

namespace compactattn {

// The argument of kernels that correct, beside their own.
struct Means {
  void* k;              // [max_num_reqs, num_kv_heads, rows, head_dim], q's type, the pool's units;
                        // zeros from a request's past blocks to the end of their tile
  void* v;              // as k
  const float* k_mean;  // [num_pages * slots, num_kv_heads, head_dim] (rust/summaries.rs)
  const float* v_mean;  // as k_mean
  const Span* spans;    // list spans
  const uint32_t* lists;  // [list rows, mask_words]
  int32_t rows;           // a multiple of kTileTokens
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t lists_per_span;
  int32_t mask_words;
  int32_t log2_block_tokens;  // a mean weighs as much as so many powers of two
};
static_assert(sizeof(Means) == 72, "host code writes this layout");

// What a tile of queries reads of the means.
struct Skipped {
  int req;
  int blocks;  // past; 0 where the list reads everything

  // Tiles of `tokens` columns.
  __device__ __forceinline__ int tiles(int tokens) const { return (blocks + tokens - 1) / tokens; }

  // Bits of the blocks that the list of row `list_row` leaves out.
  __device__ __forceinline__ uint32_t word(const Means& means, int list_row, int index) const {
    const uint32_t past = range_word(index, 0, blocks);
    const uint32_t* bits = means.lists + static_cast<int64_t>(list_row) * means.mask_words;
    return past == 0 ? 0 : ~__ldg(bits + index) & past;
  }
};

__device__ __forceinline__ Skipped skipped_by(const Means& means, const WorkItem& item) {
  const Span& span = means.spans[item.list_row / means.lists_per_span];
  return {span.req, item.stream_len < span.kv_end ? span.past >> means.log2_block_tokens : 0};
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
