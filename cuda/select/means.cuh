// Mean keys as tiles for the tensor cores, rounded to the queries' dtype (rust/select/cells.rs). A
// block that a row sees whole weighs block_size * 2^(q . k_mean).
#pragma once

#include "cells.cuh"

namespace compactattn::select {

// This thread's rows of a tile of kBlocks mean keys, by kCtaThreads threads: blocks from `first`
// on; zeros from `end` on and for those that are not whole.
template <int kCtaThreads, int kBlocks>
struct Means {
  static constexpr int kLanes = 8, kStep = kCtaThreads / kLanes, kRows = kBlocks / kStep;
  const Step& step;
  const Tile& tile;
  int first;  // block of the thread's first row
  int whole;
  int64_t pages[kRows];

  // No look-up waits for another: those of no block look where the last token lies.
  __device__ __forceinline__ Means(const Step& step, const Tile& tile, int first_block, int end)
      : step(step), tile(tile), first(first_block + static_cast<int>(threadIdx.x) / kLanes) {
    const Layout& layout = step.layout;
    whole = min(end, tile.kv_end >> layout.log2_block_tokens);
    const int32_t* table = step.batch.block_table + step.batch.table_stride * tile.span.req;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int last = ((first + r * kStep + 1) << layout.log2_block_tokens) - 1;
      pages[r] = __ldg(table + (min(last, tile.kv_end - 1) >> layout.log2_page_tokens));
    }
  }

  // Null where the tile has zeros.
  __device__ __forceinline__ const float* row(int r) const {
    const Layout& layout = step.layout;
    const int block = first + r * kStep;
    const int slots = 1 << max(0, layout.log2_page_tokens - layout.log2_block_tokens);
    const int64_t slot = pages[r] * slots + (block & (slots - 1));
    const float* means = step.stages.k_mean;
    return block < whole ? means + (slot * layout.num_kv_heads + tile.kv_head) * layout.head_dim
                         : nullptr;
  }

  // Into a tile in shared memory, kAtOnce times 32 dims at a time: so many loads are under way
  // before the first is used. With kDims, only so many dims, from `from_dim` on.
  template <class Element, int kAtOnce, int kDims = 0>
  __device__ __forceinline__ void load(char* to, int from_dim = 0) const {
    const int dims = kDims ? kDims : step.layout.head_dim;
    const uint32_t pitch = kDims ? row_bytes(kDims) : pitch_of(step.layout);
    to += threadIdx.x / kLanes * pitch;
#pragma unroll 1
    for (int d = 4 * (threadIdx.x % kLanes); d < dims; d += kAtOnce * 4 * kLanes) {
      float4 x[kAtOnce][kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float* from = row(r);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const int at = d + u * 4 * kLanes;
          x[u][r] = float4{};
          if (from && at < dims) {
            x[u][r] = __ldg(reinterpret_cast<const float4*>(from + from_dim + at));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = d + u * 4 * kLanes;
        if (at >= dims) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          *reinterpret_cast<uint2*>(to + r * kStep * pitch + 2 * at) = uint2{
              pack_pair<Element>(x[u][r].x, x[u][r].y), pack_pair<Element>(x[u][r].z, x[u][r].w)};
        }
      }
    }
  }
};

}  // namespace compactattn::select
