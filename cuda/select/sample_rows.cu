// select: which tokens of a span are scored, for the group of one KV head: most of them evenly
// strided, the others those whose queries are least like the mean, and the last
// (rust/select/sample.rs).
//
// Grid (clusters: 8, else 1; num_kv_heads, max_select_spans) x 512, dynamic shared memory
// sample_rows_bytes. A cluster's CTAs share the candidates of one (select span, KV head). The mean
// is a sum of whole numbers, so neither its order nor the number of CTAs shows.
#define COMPACTATTN_CTA_THREADS 512
#include "sample_rows_chosen.cuh"

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

// How like the mean this CTA's candidates are.
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
    if (row < unit.count && unit.lane == 0) shared.keys[row] = ordered(likeness);
  }
}

template <class E>
__device__ __forceinline__ void compare_all(const Unit& unit, int* sums, Picking& shared) {
  for (int i = threadIdx.x; i < unit.sums(); i += kWide) sums[i] = 0;
  __syncthreads();
  add_queries<E>(unit, sums);
  join_sums(sums, unit.sums());
  measure(unit, sums, shared.lengths);
  compare<E>(unit, sums, shared);
}

template <class E>
__device__ __forceinline__ void sample_any(const Step& step) {
  extern __shared__ int sums[];  // [heads, 8, lanes]
  __shared__ Picking shared;
  Planned planned;
  planned.load(step);
  if (!planned.needs_samples(step)) return;
  const Unit unit(step, planned.span, blockIdx.y);
  if (unusual_of(samples_of(step, planned.span, 0).count) > 0) compare_all<E>(unit, sums, shared);
  choose_samples(step, unit, shared);
}

}  // namespace
}  // namespace compactattn::select

// Of one SM: from 10.0 on registers would not hold the sums of two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define COMPACTATTN_SAMPLING_CTAS 1
#else
#define COMPACTATTN_SAMPLING_CTAS 2
#endif

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(512,
                                                                         COMPACTATTN_SAMPLING_CTAS)
    compactattn_sample_rows_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_any<__nv_bfloat16>(step);
}

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(512,
                                                                         COMPACTATTN_SAMPLING_CTAS)
    compactattn_sample_rows_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_any<__half>(step);
}
