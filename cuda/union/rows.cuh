// What stands between rows of scores or bits and a list: where rows lie, and how they are merged.
#pragma once

#include "../common/bits.cuh"
#include "../common/cta.cuh"
#include "../common/shared.h"
#include "../common/spans.cuh"
#include "keep.cuh"

namespace compactattn {

// Dynamic shared memory of a kernel that keeps (`keep_bytes`): words of bits, then the row where it
// fits.
__host__ __device__ inline bool row_is_shared(const Layout& layout) {
  return layout.max_blocks <= kSharedRowBlocks;
}

__device__ inline float* shared_row(const Layout& layout, uint32_t* dynamic) {
  return reinterpret_cast<float*>(dynamic + layout.mask_words);
}

// The rows of scores or bits under one list: those of `spans` select spans, `heads` query heads of
// each.
struct Members {
  int first_select;
  int spans;  // that vote
  int first_head;
  int heads;
  int num_q_heads;

  __device__ int count() const { return spans * heads; }

  __device__ int64_t row(int i) const {
    const int span = first_select + i / heads;
    return static_cast<int64_t>(span) * num_q_heads + first_head + i % heads;
  }
};

// `list`: within the span.
__device__ inline Members members_of(const Step& step, const Span& span, int list) {
  const ListHeads heads = list_heads(step.layout, list);
  int voting = span.num_selects;
  if (step.settings.non_voting_spans > 0) {
    const int q_len = step.stages.requests[span.req].q_len;
    const int first = step.layout.select_span > 0 ? span.first / step.layout.select_span : 0;
    voting = min(voting, max(0, voting_selects(step, q_len) - first));
  }
  return {span.first_select, voting, heads.first, heads.count, step.layout.num_q_heads};
}

__device__ __forceinline__ float merge(bool by_max, float rows, float sum, float score) {
  if (!by_max) return sum + score / rows;
  return isnan(sum) || isnan(score) ? NAN : fmaxf(sum, score);
}

// The mean of the rows, or their maximum, in which NaN wins: a block that cannot be judged is read.
// The mean adds shares of each row in row order, as the CPU does.
__device__ inline void merge_scores(const Step& step, const Members& members, int n,
                                    float* merged) {
  const bool by_max = step.settings.merge_max;
  const int rows = members.count();
#pragma unroll 1
  for (int first = threadIdx.x; first < n; first += kBatch * cta::kThreads) {
    float sums[kBatch];
#pragma unroll
    for (float& sum : sums) sum = by_max ? -INFINITY : 0.0f;
#pragma unroll 1
    for (int i = 0; i < rows; ++i) {
      const float* scores = step.stages.scores + members.row(i) * step.layout.max_blocks;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int j = first + u * cta::kThreads;
        if (j < n) sums[u] = merge(by_max, rows, sums[u], __ldcg(scores + j));
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int j = first + u * cta::kThreads;
      if (j < n) merged[j] = sums[u];
    }
  }
  __syncthreads();
}

// The OR of the rows' first `n` bits into `bits`, shared memory; the last word may hold more.
__device__ inline void unite_masks(const Step& step, const Members& members, int n,
                                   uint32_t* bits) {
  const int words = words_of(n), rows = members.count();
  for (int word = threadIdx.x; word < words; word += cta::kThreads) bits[word] = 0;
  __syncthreads();
  // Short rows leave threads to take rows side by side.
  const int side_by_side = max(1, cta::kThreads / max(1, words));
  for (int i = threadIdx.x; i < words * side_by_side; i += cta::kThreads) {
    const int word = i % words;
    uint32_t mine = 0;
#pragma unroll 4
    for (int row = i / words; row < rows; row += side_by_side) {
      mine |= step.stages.masks[members.row(row) * step.layout.mask_words + word];
    }
    if (mine != 0) atomicOr(&bits[word], mine);
  }
  __syncthreads();
}

}  // namespace compactattn
