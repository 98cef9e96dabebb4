// table: one row of bits to the physical boxes it names (rust/table.rs). One CTA of 256 threads.
#pragma once

#include "../common/bits.cuh"
#include "../common/cta.cuh"
#include "../common/spans.cuh"

namespace compactattn {

// Writes counts, stream_lens and boxes of list row `row`; `bits` [mask_words] is shared or global
// memory, and what it holds after the span's last block does not count.
__device__ inline void write_table_row(const Step& step, const Span& span, int64_t row,
                                       const uint32_t* bits) {
  const Layout& layout = step.layout;
  const int log2_block = layout.log2_block_tokens, log2_box = layout.log2_box_tokens;
  const int log2_per_block = log2_block - log2_box;
  const int log2_per_page = layout.log2_page_tokens - log2_box;
  const int total = pieces_of(span.kv_end, 1 << log2_block);
  const int num_boxes = pieces_of(span.kv_end, 1 << log2_box);
  const int words = words_of(total);
  const int32_t* pages = step.batch.block_table + span.req * step.batch.table_stride;
  int32_t* boxes = step.stages.boxes + row * layout.max_boxes;
  __shared__ uint32_t chunk[cta::kThreads];
  __shared__ int before[cta::kThreads];
  int blocks = 0;
  // A word a thread at a time, then all boxes of those words side by side.
  for (int base = 0; base < words; base += cta::kThreads) {
    const int word = base + threadIdx.x;
    const uint32_t mine = word < words ? bits[word] & range_word(word, 0, total) : 0;
    const cta::Sum<int> sum = cta::exclusive_sum(__popc(mine));  // ends the round before
    chunk[threadIdx.x] = mine;
    before[threadIdx.x] = blocks + sum.before;
    __syncthreads();
    const int64_t after = static_cast<int64_t>(base + cta::kThreads) << (5 + log2_per_block);
    const int end = after < num_boxes ? static_cast<int>(after) : num_boxes;
#pragma unroll 4
    for (int box = (base << (5 + log2_per_block)) + threadIdx.x; box < end; box += cta::kThreads) {
      const int block = box >> log2_per_block;
      const int at = (block >> 5) - base, bit = block & 31;
      const uint32_t set = chunk[at];
      if (!(set >> bit & 1)) continue;
      const int rank = before[at] + __popc(set & ((1u << bit) - 1));
      const int part = box & ((1 << log2_per_block) - 1);
      const int in_page = box & ((1 << log2_per_page) - 1);
      boxes[(rank << log2_per_block) + part] =
          (pages[box >> log2_per_page] << log2_per_page) + in_page;
    }
    blocks += sum.total;
  }
  if (threadIdx.x != 0) return;
  // Only the span's last block may lack boxes and tokens.
  const int last = total - 1;
  const bool has_last = total > 0 && (bits[last >> 5] >> (last & 31) & 1);
  const int lacking_boxes = has_last ? (total << log2_per_block) - num_boxes : 0;
  const int lacking_tokens = has_last ? (total << log2_block) - span.kv_end : 0;
  step.stages.counts[row] = (blocks << log2_per_block) - lacking_boxes;
  step.stages.stream_lens[row] = (blocks << log2_block) - lacking_tokens;
}

}  // namespace compactattn
