// Checked mode: one row of the table against the bits it was built from and the engine's block
// table (rust/check.rs). What is damaged is emptied, as a refused request is, and counted as
// refused.
//
// plan checks every page that a request names and table copies it later: this is the last look
// before attend, at what attend will follow.
#include "../common/bits.cuh"
#include "../common/cta.cuh"
#include "../common/spans.cuh"
#include "../ptx/grid.cuh"

namespace compactattn {
namespace {

struct Row {
  const int32_t* boxes;
  int count;
  int tokens;
  int log2_per_page;
};

// Words of a row's bits that a CTA looks at together.
struct Words {
  uint32_t bits[cta::kThreads];
  int32_t first_boxes[cta::kThreads];  // of the list: where each word's boxes begin
};

// Whether the list holds other boxes than those of `block`, from its box `at` on.
__device__ __forceinline__ bool differs_in_block(const Step& step, const Span& span, const Row& row,
                                                 int block, int at) {
  const Layout& layout = step.layout;
  const int log2_per_block = layout.log2_block_tokens - layout.log2_box_tokens;
  const int num_boxes = pieces_of_log2(span.kv_end, layout.log2_box_tokens);
  const int32_t* pages = step.batch.block_table + span.req * step.batch.table_stride;
  const int first = block << log2_per_block;
  bool differs = false;
  for (int box = first; box < min(first + (1 << log2_per_block), num_boxes); ++box, ++at) {
    const int page = pages[box >> row.log2_per_page];
    const int in_page = box & ((1 << row.log2_per_page) - 1);
    differs |= static_cast<uint32_t>(page) >= static_cast<uint32_t>(step.batch.num_pages) ||
               at >= row.count || row.boxes[at] != (page << row.log2_per_page) + in_page;
  }
  return differs;
}

// Boxes of the pool, in order of blocks, as many as the bits say. Needs stages.lists. A lane looks
// at a block, so that no thread follows one page after the other.
__device__ bool differs_from_bits(const Step& step, const Span& span, const Row& row,
                                  const uint32_t* bits) {
  __shared__ Words words;
  const Layout& layout = step.layout;
  const int log2_per_block = layout.log2_block_tokens - layout.log2_box_tokens;
  const int total = pieces_of_log2(span.kv_end, layout.log2_block_tokens);
  const int lacking_boxes =
      (total << log2_per_block) - pieces_of_log2(span.kv_end, layout.log2_box_tokens);
  const int lacking_tokens = (total << layout.log2_block_tokens) - span.kv_end;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  bool differs = false;
  int before = 0, tokens = 0;  // boxes of the words so far; tokens of this thread's
  for (int base = 0; base < words_of(total); base += cta::kThreads) {
    const int word = base + static_cast<int>(threadIdx.x);
    const uint32_t set = word < words_of(total) ? bits[word] & range_word(word, 0, total) : 0;
    const bool has_last = set != 0 && word == words_of(total) - 1 && set >> ((total - 1) & 31) & 1;
    const int boxes = (__popc(set) << log2_per_block) - (has_last ? lacking_boxes : 0);
    tokens += (__popc(set) << layout.log2_block_tokens) - (has_last ? lacking_tokens : 0);
    const cta::Sum<int> sum = cta::exclusive_sum(boxes);
    words.bits[threadIdx.x] = set;
    words.first_boxes[threadIdx.x] = before + sum.before;
    __syncthreads();
    const int count = min(cta::kThreads, words_of(total) - base);
#pragma unroll 4
    for (int i = warp; i < count; i += cta::kWarps) {
      const uint32_t near = words.bits[i];
      if (!(near >> lane & 1)) continue;
      const int below = __popc(near & ((1u << lane) - 1)) << log2_per_block;
      differs |=
          differs_in_block(step, span, row, (base + i) * 32 + lane, words.first_boxes[i] + below);
    }
    before += sum.total;  // the next sum waits before words are overwritten
  }
  return differs | (before != row.count) | (cta::total(tokens) != row.tokens);
}

// Without bits: boxes of the pool, and as many tokens as they can hold.
__device__ bool is_outside(const Step& step, const Span& span, const Row& row) {
  const int64_t most = static_cast<int64_t>(step.batch.num_pages) << row.log2_per_page;
  bool outside = row.tokens > span.kv_end ||
                 pieces_of_log2(row.tokens, step.layout.log2_box_tokens) != row.count;
  for (int i = threadIdx.x; i < row.count; i += cta::kThreads) {
    outside |= row.boxes[i] < 0 || row.boxes[i] >= most;
  }
  return outside;
}

__device__ bool is_damaged(const Step& step, const Span& span, int64_t index) {
  const Stages& stages = step.stages;
  const Row row{stages.boxes + index * step.layout.max_boxes, stages.counts[index],
                stages.stream_lens[index],
                step.layout.log2_page_tokens - step.layout.log2_box_tokens};
  if (row.count < 0 || row.count > step.layout.max_boxes || row.tokens < 0) return true;
  if (stages.lists == nullptr) return is_outside(step, span, row);
  return differs_from_bits(step, span, row, stages.lists + index * step.layout.mask_words);
}

}  // namespace
}  // namespace compactattn

// Grid max_list_spans * lists per span x 256, no dynamic shared memory. `counts` and `stream_lens`
// [list rows]: what attend may follow; those of the table, or others where that is a caller's.
extern "C" __global__ void __launch_bounds__(256, 4)
    compactattn_check_lists(const __grid_constant__ compactattn::Step step, int32_t* counts,
                            int32_t* stream_lens) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  const int64_t row = blockIdx.x;
  const int index = static_cast<int>(row / lists_per_span(step.layout));
  const Span span = step.stages.list_spans[index];  // of any value, but loaded beside the counter
  if (index >= step.stages.counters->num_list_spans) return;
  const bool damaged = __syncthreads_or(is_damaged(step, span, row));
  if (threadIdx.x != 0) return;
  counts[row] = damaged ? 0 : step.stages.counts[row];
  stream_lens[row] = damaged ? 0 : step.stages.stream_lens[row];
  if (damaged) atomicAdd(reinterpret_cast<unsigned long long*>(&step.stages.stats->refused), 1ull);
}
