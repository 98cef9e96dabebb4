// The blocks that two_level scores again (rust/select/two_level.rs, candidates): of each KV group
// the forced blocks and those of the greatest sum of scores over its heads,
// ceil(candidate_share * past blocks) together; as bits and as a list. One CTA of cta::kThreads
// threads.
#pragma once

#include "../union/rows.cuh"
#include "cells.cuh"

namespace compactattn::select {

// Sums over the heads of a group of what they say of each past block, head by head; called by the
// whole CTA. `sums` may be the first of the heads' own rows.
__device__ inline void sum_heads(const Step& step, const float* scores, int n, float* sums) {
  for (int j = threadIdx.x; j < n; j += cta::kThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int h = 0; h < step.layout.group_size; ++h) {
      const float share = __ldcg(scores + static_cast<int64_t>(h) * step.layout.max_blocks + j);
      sum += isnan(share) ? 0.0f : share;
    }
    sums[j] = sum;
  }
  __syncthreads();
}

// Lists the bits of `words`, ascending, after how many they are; called by the whole CTA.
__device__ inline void list_bits(const uint32_t* words, int blocks, int* list) {
  int done = 0;
  for (int base = 0; base < words_of(blocks); base += cta::kThreads) {
    const int word = base + threadIdx.x;
    const uint32_t bits = word < words_of(blocks) ? words[word] : 0;
    const cta::Sum<int> sum = cta::exclusive_sum(__popc(bits));
    int rank = done + sum.before;
    for (uint32_t left = bits; left != 0; left &= left - 1) {
      list[1 + rank++] = word * 32 + __ffs(left) - 1;
    }
    done += sum.total;
  }
  if (threadIdx.x == 0) list[0] = done;
}

// By one CTA for each (select span, KV head) that has scores. Dynamic shared memory as of the
// kernels that keep: a row of bits, then a row of sums where it fits.
__device__ inline void choose_candidates(const Step& step, const Span& span, int span_index,
                                         int kv_head, uint32_t* dynamic) {
  const Layout& layout = step.layout;
  const int n = past_blocks(layout, span);
  const int64_t head = static_cast<int64_t>(span_index) * layout.num_q_heads +
                       static_cast<int64_t>(kv_head) * layout.group_size;
  float* scores = step.stages.scores + head * layout.max_blocks;
  // Scores by mean keys are of no more use.
  float* sums =
      row_is_shared(layout) ? reinterpret_cast<float*>(dynamic + layout.mask_words) : scores;
  sum_heads(step, scores, n, sums);
  const compactattn::Row row = row_of(step.settings, sums, n);
  const int count = share_of(step.settings.candidate_share, n) - row.forced();
  Best best = kNothing;
  if (count >= row.free()) {
    best = {0, kAllTies, row.free()};
  } else if (count > 0) {
    const Survey seen = survey(row, 0.0f);
    best = best_of(free_blocks(row, seen), ByCount(count));
  }
  mark(row, best, dynamic);
  uint32_t* words = candidates_of(step, span_index, kv_head);
  for (int word = threadIdx.x; word < words_of(n); word += cta::kThreads) {
    words[word] = dynamic[word] |= forced_word(row, word);
  }
  list_bits(dynamic, n, candidate_list_of(step, span_index, kv_head));
}

}  // namespace compactattn::select
