// What the kernels of flashprefill share: tiles of blocks, mean keys.
#pragma once

#include "peaks.cuh"
#include "tiles.cuh"

namespace compactattn {

__device__ __forceinline__ float* peaks_of(const Step& step, int span, int q_head) {
  return peaks_of(step, static_cast<int64_t>(span) * step.layout.num_q_heads + q_head);
}

// Slot of a whole block's mean, kept under the page of its last token.
__device__ __forceinline__ int mean_slot(const Step& step, int req, int block) {
  const Layout& layout = step.layout;
  const int log2_slots = max(0, layout.log2_page_tokens - layout.log2_block_tokens);
  const int page = page_of(step, req, ((block + 1) << layout.log2_block_tokens) - 1);
  return (page << log2_slots) + (block & ((1 << log2_slots) - 1));
}

// One CTA's share: blocks `first` .. `end` of a span's request for the heads of one KV head.
struct Tile {
  Span span;
  int span_index;
  int kv_head;
  int first;
  int end;
  int row_bytes;
};

// Without means nothing can be judged.
__device__ inline void give_up(const Step& step, const Tile& tile, int group) {
  const int past = min(past_blocks_of(step, tile.span), tile.first + kBlocks);
  for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
    float* scores = scores_of(step, tile.span_index, head);
    for (int j = tile.first + threadIdx.x; j < past; j += blockDim.x)
      scores[j] = __int_as_float(0x7fc00000);
  }
}

}  // namespace compactattn
