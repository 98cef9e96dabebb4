// union and table: rows of scores or bits to one list each, then to the boxes it reads
// (rust/union.rs, rust/table.rs). Merging masks is an OR, the smallest set that covers every row
// under one list (arXiv 2605.16839, section 3); merging scores decides once on the list's own
// scores.
#include "../ptx/grid.cuh"
#include "../table/row.cuh"
#include "rows.cuh"

namespace compactattn {
namespace {

// One list, its bits in shared memory.
struct List {
  int64_t row;
  Span span;
  int past;   // blocks
  int total;  // blocks, the last perhaps in part
  bool dense;
  uint32_t* bits;
};

__device__ void add(uint64_t& counter, uint64_t more) {
  if (more > 0) atomicAdd(reinterpret_cast<unsigned long long*>(&counter), more);
}

__device__ void count_call(const Stages& stages) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  add(stages.stats->calls, 1);
  add(stages.stats->refused, stages.counters->refused);
}

// Where a list's merged scores are held while they are ranked.
__device__ float* merged_row(const Step& step, const List& list) {
  if (row_is_shared(step.layout))
    return reinterpret_cast<float*>(list.bits + step.layout.mask_words);
  return step.stages.cells + list.row * step.layout.max_blocks;
}

__device__ void select_past(const Step& step, const List& list, const Members& members,
                            bool from_masks) {
  if (from_masks) return unite_masks(step, members, list.past, list.bits);
  float* merged = merged_row(step, list);
  merge_scores(step, members, list.past, merged);
  keep(step.settings, row_of(step.settings, merged, list.past), list.bits);
}

// Forces sink and local, then applies the density guard: a list above it reads everything.
__device__ void force_and_guard(const Step& step, const List& list) {
  const Row row = row_of(step.settings, nullptr, list.past);
  int mine = 0;
  for (int word = threadIdx.x; word < words_of(list.past); word += cta::kThreads) {
    const uint32_t kept =
        (list.bits[word] & range_word(word, 0, list.past)) | forced_word(row, word);
    list.bits[word] = kept;
    mine += __popc(kept);
  }
  const int kept = cta::total(mine);
  // The last bit of an f32 share must not decide: 9 of 10 are not more than 0.9.
  const double guard = static_cast<double>(step.settings.density_guard) * (1.0 + kFloatEpsilon);
  const bool above = kept > guard * list.past;
  if (above) {
    for (int word = threadIdx.x; word < words_of(list.past); word += cta::kThreads) {
      list.bits[word] = range_word(word, 0, list.past);
    }
  }
  if (threadIdx.x != 0) return;
  Stats& stats = *step.stages.stats;
  add(stats.forced, row.forced());
  add(stats.guarded, above && kept < list.past);
  add(stats.candidates, list.past);
  add(stats.selected, above ? list.past : kept);
}

// Adds the open region, clears what lies after the span, writes the list.
__device__ void finish(const Step& step, const List& list) {
  const int first_open = list.dense ? 0 : min(list.past, list.total);
  const int past_words = list.dense ? 0 : words_of(list.past);
  uint32_t* out = step.stages.lists + list.row * step.layout.mask_words;
  for (int word = threadIdx.x; word < step.layout.mask_words; word += cta::kThreads) {
    const uint32_t kept = word < past_words ? list.bits[word] & range_word(word, 0, list.total) : 0;
    out[word] = list.bits[word] = kept | range_word(word, first_open, list.total);
  }
  if (threadIdx.x == 0) {
    add(step.stages.stats->lists, 1);
    add(step.stages.stats->dense, list.dense);
  }
  __syncthreads();
}

}  // namespace
}  // namespace compactattn

// Grid max_list_spans * lists per span x 256; dynamic shared memory 4 * mask_words bytes, and
// 4 * max_blocks more where max_blocks <= 8192. Longer rows that are merged by score need cells
// [list rows, max_blocks]. `external`: masks are given; keep_at_rows: they are those of keep_rows.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_union_table(const __grid_constant__ compactattn::Step step, int32_t external) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  extern __shared__ uint32_t dynamic[];
  count_call(step.stages);
  const int per_span = lists_per_span(step.layout);
  const int span = static_cast<int>(blockIdx.x) / per_span;
  List list{blockIdx.x, step.stages.list_spans[span], 0, 0, false, dynamic};
  if (span >= step.stages.counters->num_list_spans) return;
  const Members members =
      members_of(step, list.span, static_cast<int>(blockIdx.x) - span * per_span);
  list.past = list.span.past >> step.layout.log2_block_tokens;
  list.total = pieces_of_log2(list.span.kv_end, step.layout.log2_block_tokens);
  // Nobody asked for less than everything, as for the last rows of the official block-sparse path.
  list.dense = list.span.dense || members.spans == 0;
  if (!list.dense) {
    select_past(step, list, members, external || step.settings.keep_at_rows);
    force_and_guard(step, list);
  }
  finish(step, list);
  write_table_row(step, list.span, list.row, list.bits);
}
