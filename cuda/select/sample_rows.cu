// select: which tokens of a span are scored, for the group of one KV head: most of them evenly
// strided, the others those whose queries are least like the mean, and the last
// (rust/select/sample.rs).
//
// Grid (clusters: 8, else 1; num_kv_heads, max_select_spans) x 512, dynamic shared memory
// sample_rows_bytes. A cluster's CTAs share the candidates of one (select span, KV head). The mean
// is a sum of whole numbers, so neither its order nor the number of CTAs shows.
#define COMPACTATTN_CTA_THREADS 512
#include "sample_rows.cuh"
#include "sample_rows_held.cuh"

namespace compactattn::select {
namespace {

// Adds the CTA's queries to `sums`, shared memory, in units of the head's first candidate.
template <class E>
__device__ __forceinline__ void add_queries(const Unit& unit, int* sums) {
#pragma unroll 1
  for (int head = 0; head < unit.heads; head += kHeads) {
    int4 parts[kHeads];
    float scales[kHeads];
    int sum[kHeads][kElements] = {};
    unit.load(0, head, parts);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      Part x;
      widen<E>(parts[i], x);
      scales[i] = scale_of(x, unit.lanes);
    }
#pragma unroll 1
    for (int row = unit.group; row < unit.count; row += unit.groups) {
      unit.load(unit.token(unit.first + row), head, parts);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        Part x;
        widen<E>(parts[i], x);
#pragma unroll
        for (int e = 0; e < kElements; ++e) sum[i][e] += whole_number(x[e], scales[i]);
      }
    }
    // Vectors of a warp first: a quarter of the atomics, or half.
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        for (int d = unit.lanes; d < 32; d *= 2)
          sum[i][e] += __shfl_xor_sync(cta::kAllLanes, sum[i][e], d);
        if (head + i < unit.heads && threadIdx.x % 32 < unit.lanes)
          atomicAdd(sums + unit.at(head + i, e), sum[i][e]);
      }
    }
  }
}

// Every CTA's `sums` become those of all, as floats.
__device__ __forceinline__ void join_sums(int* sums, int length) {
  ptx::fence_cluster();
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
#pragma unroll 1
  for (int base = 0; base < length; base += kElements * kWide) {
    int all[kElements] = {};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int at = base + i * kWide + threadIdx.x;
#pragma unroll
      for (int rank = 0; rank < kSharers; ++rank)
        if (at < length) all[i] += ptx::load_from(rank, sums + at);
    }
    // All have read these before any writes them.
    ptx::fence_cluster();
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int at = base + i * kWide + threadIdx.x;
      if (at < length) sums[at] = __float_as_int(__int2float_rn(all[i]));
    }
  }
  __syncthreads();
}

// The length of each head's mean.
__device__ __forceinline__ void measure(const Unit& unit, const int* sums, float* lengths) {
#pragma unroll 1
  for (int base = 0; base < unit.heads; base += unit.groups) {
    const int head = base + unit.group;
    Part mean;
    load_mean(unit, sums, head, mean);
    const float length = __fsqrt_rn(dot(mean, mean, unit.lanes));
    if (head < unit.heads && unit.lane == 0) lengths[head] = length;
  }
  __syncthreads();
}

// Every CTA learns how like the mean this one's candidates are.
template <class E>
__device__ __forceinline__ void compare(const Unit& unit, const int* sums, Picking& shared) {
#pragma unroll 1
  for (int base = 0; base < unit.count; base += unit.groups) {
    const int row = base + unit.group;
    const int token = unit.token(min(unit.first + row, unit.candidates - 1));
    float likeness = 0.0f;
#pragma unroll 1
    for (int head = 0; head < unit.heads; head += kHeads) {
      int4 parts[kHeads];
      unit.load(token, head, parts);
      // A lane for each head: a quarter of the roots and divisions.
      float product = 0.0f, square = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        Part x, mean;
        widen<E>(parts[i], x);
        load_mean(unit, sums, head + i, mean);
        const float with_mean = dot(x, mean, unit.lanes), with_itself = dot(x, x, unit.lanes);
        if (unit.lane % kHeads == i) product = with_mean, square = with_itself;
      }
      const int own = min(head + unit.lane % kHeads, unit.heads - 1);
      const float mine = cosine(product, square, shared.lengths[own]);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const float other = __shfl_sync(cta::kAllLanes, mine, i, kHeads);
        if (head + i < unit.heads) likeness = __fadd_rn(likeness, other);
      }
    }
    if (row < unit.count && unit.lane < kSharers)
      ptx::store_to(unit.lane, shared.keys + unit.first + row, ordered(likeness));
  }
}

// As compare_held, of any number of heads and candidates.
template <class E>
__device__ __forceinline__ void compare_all(const Unit& unit, int* sums, Picking& shared) {
  for (int i = threadIdx.x; i < unit.sums(); i += kWide) sums[i] = 0;
  __syncthreads();
  add_queries<E>(unit, sums);
  join_sums(sums, unit.sums());
  measure(unit, sums, shared.lengths);
  compare<E>(unit, sums, shared);
}

// The first CTA learns which of this one's candidates are among the `wanted` least like the mean.
__device__ __forceinline__ void pick(const Unit& unit, int wanted, Picking& shared) {
  constexpr int kThreadsEach = 8;  // look at an eighth of all each
  const int part = threadIdx.x % kThreadsEach;
#pragma unroll 1
  for (int base = 0; base < unit.count; base += kWide / kThreadsEach) {
    const int row = base + static_cast<int>(threadIdx.x) / kThreadsEach;
    const int at = unit.first + min(row, unit.count - 1);
    const uint32_t own = shared.keys[at];
    int before = 0;
    const uint4* fours = reinterpret_cast<const uint4*>(shared.keys);
    for (int i = part; 4 * i < unit.candidates; i += kThreadsEach) {
      const uint4 four = fours[i];
      const uint32_t others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int u = 0; u < 4; ++u) before += others[u] < own || (others[u] == own && 4 * i + u < at);
    }
#pragma unroll
    for (int d = 1; d < kThreadsEach; d *= 2) before += __shfl_xor_sync(cta::kAllLanes, before, d);
    if (part == 0 && row < unit.count) ptx::store_to_first(shared.picked + at, before < wanted);
  }
}

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

// Merges the chosen tokens and the usual ones, ascending. One CTA.
__device__ __forceinline__ void write_samples(const Unit& unit, int count, int wanted,
                                              Picking& shared, int* samples) {
  constexpr int kEach = kMostCandidates / kWide;
  static_assert(kEach * kWide == kMostCandidates);
  const int first = static_cast<int>(threadIdx.x) * kEach;
  int mine = 0;
  for (int i = 0; i < kEach; ++i) mine += first + i < unit.candidates && shared.picked[first + i];
  int to = cta::exclusive_sum(mine).before;
  for (int i = 0; i < kEach; ++i) {
    if (first + i < unit.candidates && shared.picked[first + i])
      shared.chosen[to++] = unit.token(first + i);
  }
  __syncthreads();
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

template <class E>
__device__ __forceinline__ void sample_rows(const Step& step) {
  extern __shared__ int sums[];  // [heads, 8, lanes]
  __shared__ Picking shared;
  ptx::wait_for_earlier();
  const int kv_head = blockIdx.y;
  const Span* span = scored_span(step, blockIdx.z);
  if (!span) return;
  const int count = samples_of(step, *span, 0).count, wanted = unusual_of(count);
  if (count == span->len) return;
  const Unit unit(step, *span, kv_head);
  if (wanted > 0) {
    for (int i = unit.candidates + threadIdx.x; i < kMostCandidates; i += kWide)
      shared.keys[i] = kUnlikely;
    if (is_held(unit)) {
      compare_held<E>(unit, sums, shared);
    } else {
      compare_all<E>(unit, sums, shared);
    }
    ptx::fence_cluster();
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
    pick(unit, wanted, shared);
    ptx::fence_cluster();
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
  }
  if (kSharers == 1 || cluster_rank() == 0)
    write_samples(unit, count, wanted, shared, samples_at(step, blockIdx.z, kv_head));
}

}  // namespace
}  // namespace compactattn::select

// Of one SM: with clusters a thread's registers hold queries.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define COMPACTATTN_SAMPLING_CTAS 1
#else
#define COMPACTATTN_SAMPLING_CTAS 2
#endif

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(512,
                                                                         COMPACTATTN_SAMPLING_CTAS)
    compactattn_sample_rows_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_rows<__nv_bfloat16>(step);
}

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(512,
                                                                         COMPACTATTN_SAMPLING_CTAS)
    compactattn_sample_rows_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_rows<__half>(step);
}
