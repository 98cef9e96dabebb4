// select: which tokens of a span are scored, for the group of one KV head: most of them evenly
// strided, the others those whose queries are least like the mean, and the last
// (rust/select/sample.rs).
//
// Grid (clusters: 8, else 1; num_kv_heads, max_select_spans) x 512, dynamic shared memory
// sample_rows_bytes. A cluster's CTAs share the candidates of one (select span, KV head). The mean
// is a sum of whole numbers, so neither its order nor the number of CTAs shows.
#define COMPACTATTN_CTA_THREADS 512
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/type_traits>

#include "cells.cuh"
#include "cluster.cuh"

namespace compactattn::select {
namespace {

constexpr int kCandidates = 512;
constexpr int kBits = 11;  // of a whole number in the first candidate's query, beside its sign
constexpr int kLeastExponent = -100;
constexpr float kMost = 1 << 20;      // of a whole number: 512 of them fit 32 bits
constexpr float kRounding = 3 << 22;  // numbers up to 2^22 added to it are rounded to whole ones
constexpr int kElements = 8;          // of a 16-byte load
constexpr int kHeads = 4;             // whose loads are under way together
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kSharers = kCtas;
#else
constexpr int kSharers = 1;
#endif

struct Picking {
  alignas(16) uint32_t keys[kCandidates];  // of all candidates: lower is less like the mean
  int32_t picked[kCandidates];  // the first CTA's: whether a candidate is one of the chosen
  int32_t chosen[kCandidates];  // their tokens, ascending
  float lengths[64];            // of each head's mean
};

// What a CTA works on. Sixteen bytes of a query are a lane's; `lanes` of them hold a vector.
struct Unit {
  Span span;
  const int4* queries;                // of the span's first token, the group's first head
  int64_t token_stride, head_stride;  // of 16 bytes
  int heads, units;                   // of 16 bytes in a vector
  int candidates, first, count;       // of the span; this CTA's
  int lanes, lane, group, groups;     // that hold a vector; of this thread

  __device__ Unit(const Step& step, const Span& span, int kv_head) : span(span) {
    const Batch& batch = step.batch;
    heads = step.layout.group_size;
    units = step.layout.head_dim / kElements;
    token_stride = batch.q_token_stride / kElements;
    head_stride = batch.q_head_stride / kElements;
    queries = static_cast<const int4*>(batch.q) + span.q_start * token_stride +
              static_cast<int64_t>(kv_head) * heads * head_stride;
    candidates = min(span.len, kCandidates);
    const int each = (candidates + kSharers - 1) / kSharers;
    const int rank = kSharers > 1 ? cluster_rank() : 0;
    first = min(candidates, rank * each);
    count = min(each, candidates - first);
    lanes = units <= 8 ? 8 : units <= 16 ? 16 : 32;
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    groups = kWide / lanes;
  }

  __device__ __forceinline__ int token(int candidate) const {
    return static_cast<int>(static_cast<int64_t>(candidate) * span.len / candidates);
  }

  // This lane's part of the queries of a token's heads from `head` on; zeros past the group's.
  __device__ __forceinline__ void load(int token, int head, int4 (&parts)[kHeads]) const {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      parts[i] = {};
      if (head + i < heads && lane < units)
        parts[i] = __ldg(queries + token * token_stride + (head + i) * head_stride + lane);
    }
  }

  // Where this lane's element `e` of a head's vector lies among sums.
  __device__ __forceinline__ int at(int head, int e) const {
    return (head * kElements + e) * lanes + lane;
  }
};

using Part = float[kElements];

template <class E>
__device__ __forceinline__ void widen(const int4& part, Part& x) {
  const int words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 two;
    if constexpr (cuda::std::is_same_v<E, __half>) {
      two = __half22float2(reinterpret_cast<const __half2&>(words[i]));
    } else {
      two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words[i]));
    }
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}

// The power of two that puts a vector's largest finite component into 2^10 .. 2^11.
__device__ __forceinline__ float scale_of(const Part& x, int lanes) {
  float top = 0.0f;
#pragma unroll
  for (int e = 0; e < kElements; ++e) top = fmaxf(top, isfinite(x[e]) ? fabsf(x[e]) : 0.0f);
  for (int d = 1; d < lanes; d *= 2) top = fmaxf(top, __shfl_xor_sync(cta::kAllLanes, top, d));
  const int exponent = max(kLeastExponent, (__float_as_int(top) >> 23) - 126);
  return __int_as_float((kBits - exponent + 127) << 23);
}

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
        for (int e = 0; e < kElements; ++e) {
          const float most = fminf(fmaxf(__fmul_rn(x[e], scales[i]), -kMost), kMost);
          sum[i][e] += __float_as_int(__fadd_rn(most, kRounding)) - __float_as_int(kRounding);
        }
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

// The product of two vectors, eight elements a lane one after the other, then lanes pair by pair:
// every step rounded, as on a host.
__device__ __forceinline__ float dot(const Part& a, const Part& b, int lanes) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kElements; ++e) sum = __fadd_rn(sum, __fmul_rn(a[e], b[e]));
  for (int d = 1; d < lanes; d *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(cta::kAllLanes, sum, d));
  return sum;
}

__device__ __forceinline__ void load_mean(const Unit& unit, const int* sums, int head, Part& mean) {
#pragma unroll
  for (int e = 0; e < kElements; ++e)
    mean[e] = head < unit.heads ? __int_as_float(sums[unit.at(head, e)]) : 0.0f;
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

// A vector of zeros, or too small or large for its square, is like any other.
__device__ __forceinline__ float cosine(float product, float square, float length) {
  const float cosine = __fdiv_rn(product, __fmul_rn(__fsqrt_rn(square), length));
  return isfinite(cosine) ? cosine : 1.0f;
}

// A number that grows with the float.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
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
    for (int i = part; i < unit.candidates; i += kThreadsEach) {
      const uint32_t other = shared.keys[i];
      before += other < own || (other == own && i < at);
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
    return static_cast<int>(static_cast<int64_t>(i) * (before - 1) / (even - 1));
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
  constexpr int kEach = kCandidates / kWide;
  static_assert(kEach * kWide == kCandidates);
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
    const int length = unit.heads * kElements * unit.lanes;
    for (int i = threadIdx.x; i < length; i += kWide) sums[i] = 0;
    __syncthreads();
    add_queries<E>(unit, sums);
    join_sums(sums, length);
    measure(unit, sums, shared.lengths);
    compare<E>(unit, sums, shared);
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

// Of one SM, by registers: two where 64 a thread hold everything.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
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
