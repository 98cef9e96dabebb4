// Mean keys as tiles for the tensor cores, rounded to the queries' dtype (rust/select/cells.rs). A
// block that a row sees whole weighs block_size * 2^(q . k_mean).
#pragma once

#include "cells.cuh"

namespace compactattn::select {

__device__ __forceinline__ const float* mean_key(const Step& step, const Tile& tile, int block) {
  const Layout& layout = step.layout;
  const int last = ((block + 1) << layout.log2_block_tokens) - 1;
  const int64_t page = __ldg(step.batch.block_table + step.batch.table_stride * tile.span.req +
                             (last >> layout.log2_page_tokens));
  const int slots = 1 << max(0, layout.log2_page_tokens - layout.log2_block_tokens);
  const int64_t slot = page * slots + (block & (slots - 1));
  return step.stages.k_mean + (slot * layout.num_kv_heads + tile.kv_head) * layout.head_dim;
}

// Mean keys of kBlocks blocks from `first` on; zeros for blocks from `end` on and those that are not
// whole. By kCtaThreads threads. With kDims, only so many dims of them, from `from_dim` on.
template <class Element, int kCtaThreads, int kBlocks, int kDims = 0>
__device__ void load_means(const Step& step, const Tile& tile, int first, int end, char* to,
                           int from_dim = 0) {
  constexpr int kLanes = 8, kStep = kCtaThreads / kLanes, kRows = kBlocks / kStep;
  const uint32_t pitch = kDims ? row_bytes(kDims) : pitch_of(step.layout);
  const int whole = min(end, tile.kv_end >> step.layout.log2_block_tokens);
  const int from = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const float* means[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int block = first + from + r * kStep;
    means[r] = block < whole ? mean_key(step, tile, block) : nullptr;
  }
  // All rows' loads are under way before the first is used.
#pragma unroll 2
  for (int d = 4 * lane; d < (kDims ? kDims : step.layout.head_dim); d += 4 * kLanes) {
    float4 x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = means[r] ? __ldg(reinterpret_cast<const float4*>(means[r] + from_dim + d)) : float4{};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      *reinterpret_cast<uint2*>(to + (from + r * kStep) * pitch + 2 * d) =
          uint2{pack_pair<Element>(x[r].x, x[r].y), pack_pair<Element>(x[r].z, x[r].w)};
    }
  }
}

}  // namespace compactattn::select
