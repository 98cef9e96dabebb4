// Mean correction: a past block that a list leaves out still takes part, as one key with the weight
// of its tokens (rust/attend/mod.rs).
//
// A request's means lie in a row, listed blocks and others, in the pool's type: one such row serves
// every list of its KV head, and what a list reads by itself is masked. A list's means are tiles
// before those of its stream, so that cuts and pieces count both alike.
#pragma once

#include "bits.cuh"
#include "work.cuh"

namespace compactattn {

// The argument of kernels that correct, beside their own.
struct Means {
  void* k;                // [max_num_reqs, num_kv_heads, rows, head_dim], as the pool's elements;
                          // zeros from a request's past blocks to the end of their tile
  void* v;                // as k
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
};
static_assert(sizeof(Means) == 72, "host code writes this layout");

// What a tile of queries reads of the means.
struct Skipped {
  const uint32_t* bits;  // the list's, set where it reads the block itself
  int req;
  int blocks;  // past; 0 where the list reads everything

  // Tiles of `tokens` columns.
  __device__ __forceinline__ int tiles(int tokens) const { return (blocks + tokens - 1) / tokens; }

  // Bits of blocks that are left out.
  __device__ __forceinline__ uint32_t word(int index) const {
    const uint32_t past = range_word(index, 0, blocks);
    return past == 0 ? 0 : ~__ldg(bits + index) & past;
  }
};

__device__ __forceinline__ Skipped skipped_by(const Means& means, const WorkItem& item) {
  const Span& span = means.spans[item.list_row / means.lists_per_span];
  Skipped skipped;
  skipped.bits = means.lists + static_cast<int64_t>(item.list_row) * means.mask_words;
  skipped.req = span.req;
  skipped.blocks = item.stream_len < span.kv_end ? span.past >> means.log2_block_tokens : 0;
  return skipped;
}

// A piece in a kernel's own tiles of `kTokens`: means are tiles 0 .. means, the stream follows. Of
// plan's tiles, which may be longer, those parts are left out that hold no mean or that no row
// sees.
template <int kTokens, bool kMeans>
struct TileRange {
  int begin;
  int end;
  int means;

  static_assert(kTileTokens % kTokens == 0);

  __device__ __forceinline__ TileRange(const LoadedPiece& piece, const Skipped& skipped) {
    constexpr int kParts = kTileTokens / kTokens;
    means = kMeans ? skipped.tiles(kTokens) : 0;
    const int planned = kMeans ? skipped.tiles(kTileTokens) : 0;
    const auto own = [&](int tile) {
      return kMeans && tile < planned ? tile * kParts : means + (tile - planned) * kParts;
    };
    begin = own(piece.begin);
    end = own(piece.end);
    if constexpr (kParts > 1) {
      const int seen = piece.stream.visible + piece.item.num_tokens - 1;
      end = min(end, means + max(seen + kTokens - 1, 0) / kTokens);
    }
  }

  // The first tile of the piece that is of the stream.
  __device__ __forceinline__ int stream_begin() const { return kMeans ? max(begin, means) : begin; }
};

// Powers of two that a mean's weight has more than a token's.
__device__ __forceinline__ float mean_bias(const Means& means) {
  return static_cast<float>(means.log2_block_tokens);
}

}  // namespace compactattn
