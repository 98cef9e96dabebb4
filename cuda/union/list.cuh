// One list, from its rows of scores or bits to the boxes it reads (rust/union.rs, rust/table.rs).
// Merging masks is an OR, the smallest set that covers every row under one list (arXiv 2605.16839,
// section 3); merging scores decides once on the list's own scores. One CTA of cta::kThreads
// threads.
#pragma once

#include "../table/row.cuh"
#include "rows.cuh"

namespace compactattn {

// One list, its bits in shared memory.
struct List {
  int row;
  Span span;
  int past;   // blocks
  int total;  // blocks, the last perhaps in part
  bool dense;
  uint32_t* bits;
};

__device__ inline void add(uint64_t& counter, uint64_t more) {
  if (more > 0) atomicAdd(reinterpret_cast<unsigned long long*>(&counter), more);
}

// By one thread of a step.
__device__ inline void count_call(const Stages& stages) {
  add(stages.stats->calls, 1);
  add(stages.stats->refused, stages.counters->refused);
}

// Where a list's merged scores are held while they are ranked.
__device__ inline float* merged_row(const Step& step, const List& list) {
  if (row_is_shared(step.layout)) return shared_row(step.layout, list.bits);
  return step.stages.cells + static_cast<int64_t>(list.row) * step.layout.max_blocks;
}

__device__ inline void select_past(const Step& step, const List& list, const Members& members,
                                   bool from_masks, bool is_merged, const Survey& seen) {
  if (from_masks) return unite_masks(step, members, list.past, list.bits);
  float* merged = merged_row(step, list);
  const Row row = row_of(step.settings, merged, list.past);
  if (!is_merged) merge_scores(step, members, list.past, merged);
  keep(step.settings, row, list.bits, is_merged, seen);
}

// Forces sink and local, then applies the density guard: a list above it reads everything.
__device__ inline void force_and_guard(const Step& step, const List& list) {
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
__device__ inline void finish(const Step& step, const List& list) {
  const int first_open = list.dense ? 0 : min(list.past, list.total);
  const int past_words = list.dense ? 0 : words_of(list.past);
  uint32_t* out = step.stages.lists + static_cast<int64_t>(list.row) * step.layout.mask_words;
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

// List `part` of list span `index`, which is `span`; `dynamic` as union_table.cu has it, with the
// merged scores in it where `is_merged`, which `seen` surveys.
__device__ inline void write_list(const Step& step, int index, const Span& span, int part,
                                  bool from_masks, uint32_t* dynamic, bool is_merged = false,
                                  Survey seen = {}) {
  const int row = index * lists_per_span(step.layout) + part;
  List list{row, span, 0, 0, false, dynamic};
  const Members members = members_of(step, span, part);
  list.past = span.past >> step.layout.log2_block_tokens;
  list.total = pieces_of_log2(span.kv_end, step.layout.log2_block_tokens);
  // Nobody asked for less than everything, as for the last rows of the official block-sparse path.
  list.dense = span.dense || members.spans == 0;
  if (!list.dense) {
    select_past(step, list, members, from_masks, is_merged, seen);
    force_and_guard(step, list);
  }
  finish(step, list);
  write_table_row(step, span, row, list.bits);
}

}  // namespace compactattn
