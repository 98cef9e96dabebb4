// table: one row of bits to the physical boxes it names (rust/table.rs). One CTA of cta::kThreads
// threads.
#pragma once

#include "../common/bits.cuh"
#include "../common/cta.cuh"
#include "../common/spans.cuh"

namespace compactattn {

constexpr int kChunkWords = 256;
static_assert(kChunkWords <= cta::kThreads, "a thread for each");

// The set bits of some words.
struct Chunk {
  uint32_t words[kChunkWords];
  int before[kChunkWords];            // set bits in the words before
  uint16_t blocks[kChunkWords * 32];  // ascending, counted from the chunk's first
};

// The chunk from word `base` on, without bits from `total` on; how many are set.
__device__ __forceinline__ int fill_chunk(Chunk& chunk, const uint32_t* bits, int base, int total) {
  const int words = min(kChunkWords, words_of(total) - base), lane = threadIdx.x % 32;
  const int word = base + threadIdx.x;
  const uint32_t mine =
      static_cast<int>(threadIdx.x) < words ? bits[word] & range_word(word, 0, total) : 0;
  const cta::Sum<int> sum = cta::exclusive_sum(__popc(mine));  // all are done with the last chunk
  if (threadIdx.x < kChunkWords) {
    chunk.words[threadIdx.x] = mine;
    chunk.before[threadIdx.x] = sum.before;
  }
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < words; i += cta::kWarps) {
    const uint32_t set = chunk.words[i];
    const int at = chunk.before[i] + __popc(set & ((1u << lane) - 1));
    if (set >> lane & 1) chunk.blocks[at] = static_cast<uint16_t>(i * 32 + lane);
  }
  __syncthreads();
  return sum.total;
}

// Writes counts, stream_lens and boxes of list row `row`; `bits` [mask_words] is shared or global
// memory, and what it holds after the span's last block does not count.
__device__ inline void write_table_row(const Step& step, const Span& span, int64_t row,
                                       const uint32_t* bits) {
  const Layout& layout = step.layout;
  const int log2_block = layout.log2_block_tokens, log2_box = layout.log2_box_tokens;
  const int log2_per_block = log2_block - log2_box;
  const int log2_per_page = layout.log2_page_tokens - log2_box;
  const int total = pieces_of_log2(span.kv_end, log2_block);
  const int num_boxes = pieces_of_log2(span.kv_end, log2_box);
  const int words = words_of(total);
  const int32_t* pages = step.batch.block_table + span.req * step.batch.table_stride;
  int32_t* boxes = step.stages.boxes + row * layout.max_boxes;
  __shared__ Chunk chunk;
  int blocks = 0;
  for (int base = 0; base < words; base += kChunkWords) {
    const int found = fill_chunk(chunk, bits, base, total);
    const int32_t first = base * 32, end = found << log2_per_block;
    int32_t* out = boxes + (blocks << log2_per_block);
#pragma unroll 8
    for (int i = threadIdx.x; i < end; i += cta::kThreads) {
      const int block = first + chunk.blocks[i >> log2_per_block];
      const int box = (block << log2_per_block) + (i & ((1 << log2_per_block) - 1));
      if (box >= num_boxes) continue;
      const int in_page = box & ((1 << log2_per_page) - 1);
      out[i] = (__ldg(pages + (box >> log2_per_page)) << log2_per_page) + in_page;
    }
    blocks += found;
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
