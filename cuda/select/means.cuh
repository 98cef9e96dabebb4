// Mean keys as tiles for the tensor cores: each as the sum of two 16-bit vectors. bf16 pairs hold
// 16 bits of it, fp16 pairs 22 or down to 2^-25. A block that a row sees whole weighs block_size *
// 2^(q . k_mean).
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

template <class Element>
__device__ __forceinline__ uint32_t high_and_rest(float& x, float& y);

template <>
__device__ __forceinline__ uint32_t high_and_rest<__nv_bfloat16>(float& x, float& y) {
  const __nv_bfloat162 high = __floats2bfloat162_rn(x, y);
  x -= __low2float(high);
  y -= __high2float(high);
  return reinterpret_cast<const uint32_t&>(high);
}

template <>
__device__ __forceinline__ uint32_t high_and_rest<__half>(float& x, float& y) {
  const __half2 high = __floats2half2_rn(x, y);
  x -= __low2float(high);
  y -= __high2float(high);
  return reinterpret_cast<const uint32_t&>(high);
}

// Mean keys of kBlocks blocks from `first` on, their high parts in one tile, the rest in the next;
// zeros for blocks from `end` on and those that are not whole. By kCtaThreads threads. With kDims,
// only so many dims of them, from `from_dim` on.
template <class Element, int kCtaThreads, int kBlocks, int kDims = 0>
__device__ void load_means(const Step& step, const Tile& tile, int first, int end, char* high,
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
      char* to = high + (from + r * kStep) * pitch + 2 * d;
      uint2 words;
      words.x = high_and_rest<Element>(x[r].x, x[r].y);
      words.y = high_and_rest<Element>(x[r].z, x[r].w);
      *reinterpret_cast<uint2*>(to) = words;
      words.x = pack_pair<Element>(x[r].x, x[r].y);
      words.y = pack_pair<Element>(x[r].z, x[r].w);
      *reinterpret_cast<uint2*>(to + kBlocks * pitch) = words;
    }
  }
}

}  // namespace compactattn::select
