// sample_rows once it is known how like the mean each candidate is: the least like it, and the
// usual tokens.
#pragma once

#include "sample_rows.cuh"

namespace compactattn::select {

// Samples of a span that are no unusual ones, ascending: `even` strided over all but the last.
struct Usual {
  int before;  // the last tokens
  int even;
  int count;

  __device__ Usual(const Span& span, int count)
      : before(span.len - last_of(count)),
        even(count - unusual_of(count) - last_of(count)),
        count(count - unusual_of(count)) {}

  __device__ __forceinline__ int token(int i) const {
    if (i >= even) return before + i - even;
    if (even == 1) return before - 1;
    return scaled(i, before - 1, even - 1);
  }
};

// The first of `count` numbers that is not before, where those that are come first.
template <class IsBefore>
__device__ __forceinline__ int first_not(int count, IsBefore is_before) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (is_before(middle)) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// Gives the first CTA the candidates of this one that may be among the `wanted`: as many, those
// least like the mean.
__device__ __forceinline__ void send_best(const Unit& unit, int wanted, Picking& shared) {
  constexpr int kThreadsEach = kWide / kMostOfCta < 8 ? 8 : kWide / kMostOfCta;  // of a candidate
  const int part = threadIdx.x % kThreadsEach;
  __syncthreads();
#pragma unroll 1
  for (int base = 0; base < unit.count; base += kWide / kThreadsEach) {
    const int row = base + static_cast<int>(threadIdx.x) / kThreadsEach;
    const uint32_t own = shared.keys[min(row, unit.count - 1)];
    int before = 0;
#pragma unroll 4
    for (int i = part; i < unit.count; i += kThreadsEach) {
      before += shared.keys[i] < own + (i < row);  // of equal ones the first; no key is the largest
    }
#pragma unroll
    for (int d = 1; d < kThreadsEach; d *= 2) before += __shfl_xor_sync(cta::kAllLanes, before, d);
    if (part > 1 || row >= unit.count || before >= wanted) continue;
    const int rank = kSharers > 1 ? cluster_rank() : 0;
    uint32_t* to = part == 0 ? shared.best_keys[rank] : shared.best[rank];
    ptx::store_to(0, to + before, part == 0 ? own : static_cast<uint32_t>(unit.first + row));
  }
}

// The tokens of the `wanted` best, ascending. The first CTA, when it has been sent them.
__device__ __forceinline__ void choose(const Unit& unit, int wanted, Picking& shared) {
  const int most = min(unit.each(), wanted), other = threadIdx.x % kSharers;
  const int others = min(unit.count_of(other), wanted);
#pragma unroll 1
  for (int base = 0; base < most * kSharers; base += kWide / kSharers) {
    const int i = base + static_cast<int>(threadIdx.x) / kSharers, cta = i / most, at = i % most;
    const bool exists = cta < kSharers && at < min(unit.count_of(cta), wanted);
    const uint32_t own = exists ? shared.best_keys[cta][at] : 0;
    // Of equal ones those of the CTA before come first.
    const uint32_t* keys = shared.best_keys[other];
    int before = at;
    if (other != cta)
      before = first_not(others, [&](int j) { return keys[j] < own + (other < cta); });
#pragma unroll
    for (int d = 1; d < kSharers; d *= 2) before += __shfl_xor_sync(cta::kAllLanes, before, d);
    if (exists && other == 0 && before < wanted) shared.unsorted[before] = shared.best[cta][at];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < wanted; i += kWide) {
    const int own = shared.unsorted[i];
    int before = 0;
    for (int j = 0; j < wanted; ++j) before += shared.unsorted[j] < own;
    shared.chosen[before] = unit.token(own);
  }
  __syncthreads();
}

// Merges the chosen tokens and the usual ones, ascending. One CTA.
__device__ __forceinline__ void write_samples(const Unit& unit, int count, int wanted,
                                              const Picking& shared, int* samples) {
  const Usual usual(unit.span, count);
  for (int i = threadIdx.x; i < usual.count; i += kWide) {
    const int token = usual.token(i);
    samples[i + first_not(wanted, [&](int j) { return shared.chosen[j] < token; })] = token;
  }
  for (int i = threadIdx.x; i < wanted; i += kWide) {
    const int token = shared.chosen[i];
    samples[i + first_not(usual.count, [&](int j) { return usual.token(j) <= token; })] = token;
  }
}

// The span of this CTA as plan_spans has written it.
struct Planned {
  Span span;
  bool exists;

  __device__ __forceinline__ void load(const Step& step) {
    ptx::wait_for_earlier();
    exists = static_cast<int>(blockIdx.z) < step.stages.counters->num_select_spans;
    if (exists) span = step.stages.select_spans[blockIdx.z];
  }

  // Whether it has scores, of some of its tokens.
  __device__ __forceinline__ bool needs_samples(const Step& step) const {
    return exists && !span.dense && past_blocks(step.layout, span) > 0 &&
           samples_of(step, span, 0).count < span.len;
  }
};

// Chooses the samples of one (select span, KV head) by the keys of each CTA's candidates.
__device__ __forceinline__ void choose_samples(const Step& step, const Unit& unit,
                                               Picking& shared) {
  const int count = samples_of(step, unit.span, 0).count, wanted = unusual_of(count);
  if (wanted > 0) {
    send_best(unit, wanted, shared);
    ptx::fence_cluster();
    __syncwarp();
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
  }
  if (kSharers > 1 && cluster_rank() > 0) return;
  if (wanted > 0) choose(unit, wanted, shared);
  write_samples(unit, count, wanted, shared, samples_at(step, blockIdx.z, blockIdx.y));
}

}  // namespace compactattn::select
