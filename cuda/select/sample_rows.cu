// select: which tokens of a span are scored, for the group of one KV head: most of them evenly
// strided, the others those whose queries are least like the mean (rust/select/sample.rs).
//
// Grid (clusters: 8, else 1; num_kv_heads, max_select_spans) x 256, dynamic shared memory
// sample_rows_bytes. A cluster's CTAs share the candidates of one (select span, KV head). Sums are
// of whole numbers, so neither their order nor the number of CTAs shows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/type_traits>

#include "cells.cuh"
#include "cluster.cuh"

namespace compactattn::select {
namespace {

constexpr int kCandidates = 1024;
constexpr int kBits = 11;  // of a whole number, beside its sign
constexpr int kLeastExponent = -100;
constexpr int kHalves = 8;  // 16-byte loads of a thread under way, and elements of one
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kSharers = kCtas;
#else
constexpr int kSharers = 1;
#endif

struct Picking {
  uint2 keys[kCandidates];      // of all candidates: least like the mean first, by number
  int32_t picked[kCandidates];  // the first CTA's: whether a candidate is one of the chosen
  int32_t chosen[kCandidates];  // their tokens, ascending
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
    units = step.layout.head_dim / kHalves;
    token_stride = batch.q_token_stride / kHalves;
    head_stride = batch.q_head_stride / kHalves;
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

  // This lane's part of the queries of head `head` of `kHalves` candidates, from the CTA's `row` on
  // every `groups`-th; zeros for those that there are not.
  __device__ __forceinline__ void load(int head, int row, int4 (&parts)[kHalves]) const {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int at = row + i * groups;
      parts[i] = {};
      if (at < count && lane < units)
        parts[i] = __ldg(queries + token(first + at) * token_stride + head * head_stride + lane);
    }
  }
};

template <class E>
__device__ __forceinline__ float2 two_of(uint32_t bits) {
  if constexpr (cuda::std::is_same_v<E, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(bits));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
  }
}

// The largest of a vector's lanes, or the sum.
__device__ __forceinline__ float vector_max(float x, int lanes) {
  for (int d = 1; d < lanes; d *= 2) x = fmaxf(x, __shfl_xor_sync(cta::kAllLanes, x, d));
  return x;
}

__device__ __forceinline__ int vector_sum(int x, int lanes) {
  for (int d = 1; d < lanes; d *= 2) x += __shfl_xor_sync(cta::kAllLanes, x, d);
  return x;
}

// A vector times the power of two that puts its largest component into 2^10..2^11, rounded; what is
// no number is 0.
template <class E>
__device__ __forceinline__ void whole_numbers(const int4& part, int lanes, int (&whole)[kHalves]) {
  float x[kHalves];
  const uint32_t words[4] = {static_cast<uint32_t>(part.x), static_cast<uint32_t>(part.y),
                             static_cast<uint32_t>(part.z), static_cast<uint32_t>(part.w)};
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = two_of<E>(words[i]);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
    top = fmaxf(top, isfinite(two.x) ? fabsf(two.x) : 0.0f);
    top = fmaxf(top, isfinite(two.y) ? fabsf(two.y) : 0.0f);
  }
  top = vector_max(top, lanes);
  const int exponent = max(kLeastExponent, (__float_as_int(top) >> 23) - 126);
  const float scale = __int_as_float(kBits - exponent + 127 << 23);
  constexpr float kMost = (1 << kBits) - 1;
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    const float scaled = rintf(__fmul_rn(x[i], scale));
    whole[i] = isnan(scaled) ? 0 : static_cast<int>(fminf(fmaxf(scaled, -kMost), kMost));
  }
}

// Adds the CTA's queries to `sums`, [heads, head_dim], shared memory.
template <class E>
__device__ __forceinline__ void add_queries(const Unit& unit, int* sums) {
#pragma unroll 1
  for (int row = unit.group; row - unit.group < unit.count; row += kHalves * unit.groups) {
#pragma unroll 1
    for (int head = 0; head < unit.heads; ++head) {
      int4 parts[kHalves];
      unit.load(head, row, parts);
      int sum[kHalves] = {};
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        int whole[kHalves];
        whole_numbers<E>(parts[i], unit.lanes, whole);
#pragma unroll
        for (int e = 0; e < kHalves; ++e) sum[e] += whole[e];
      }
      // Vectors of a warp first: a quarter of the atomics, or half.
#pragma unroll
      for (int e = 0; e < kHalves; ++e) {
        for (int d = unit.lanes; d < 32; d *= 2)
          sum[e] += __shfl_xor_sync(cta::kAllLanes, sum[e], d);
      }
      if (threadIdx.x % 32 < unit.units) {
#pragma unroll
        for (int e = 0; e < kHalves; ++e)
          atomicAdd(sums + (head * unit.units + unit.lane) * kHalves + e, sum[e]);
      }
    }
  }
}

// Every CTA's `sums` become those of all.
__device__ __forceinline__ void join_sums(int* sums, int length) {
  ptx::fence_cluster();
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
  if constexpr (kSharers > 1) {
#pragma unroll 1
    for (int first = threadIdx.x; first - static_cast<int>(threadIdx.x) < length;
         first += kHalves * kWide) {
      int all[kHalves] = {};
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        const int at = first + i * kWide;
        for (int rank = 0; rank < kSharers; ++rank)
          if (at < length) all[i] += ptx::load_from(rank, sums + at);
      }
      // All have read these before any writes them.
      ptx::arrive_at_cluster();
      ptx::wait_for_cluster();
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        const int at = first + i * kWide;
        if (at < length) sums[at] = all[i];
      }
    }
  }
  __syncthreads();
}

// Halves a head's sums, rounded down, as often as the largest needs to come below 2^11; and the
// product of what is left with itself. A warp a head.
__device__ __forceinline__ void narrow(int* sums, int* products, int heads, int head_dim) {
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < heads; head += kWide / 32) {
    int* mine = sums + head * head_dim;
    unsigned top = 0;
    for (int i = lane; i < head_dim; i += 32) top = max(top, static_cast<unsigned>(abs(mine[i])));
    top = __reduce_max_sync(cta::kAllLanes, top);
    const int shift = max(0, 32 - __clz(top) - kBits);
    int product = 0;
    for (int i = lane; i < head_dim; i += 32) {
      const int x = mine[i] >> shift;
      mine[i] = x;
      product += x * x;
    }
    product = __reduce_add_sync(cta::kAllLanes, product);
    if (lane == 0) products[head] = product;
  }
  __syncthreads();
}

// Of vectors with these products; a vector of zeros is like any other. Every step is rounded to the
// nearest, as on a host.
__device__ __forceinline__ float cosine(int product, int a, int b) {
  if (a == 0 || b == 0) return 1.0f;
  const float lengths = __fmul_rn(__fsqrt_rn(__int2float_rn(a)), __fsqrt_rn(__int2float_rn(b)));
  return __fdiv_rn(__int2float_rn(product), lengths);
}

// A number that grows with the float.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Every CTA learns how like the mean this one's candidates are.
template <class E>
__device__ __forceinline__ void compare(const Unit& unit, const int* means, const int* products,
                                        Picking& shared) {
#pragma unroll 1
  for (int row = unit.group; row - unit.group < unit.count; row += kHalves * unit.groups) {
    float likeness[kHalves] = {};
#pragma unroll 1
    for (int head = 0; head < unit.heads; ++head) {
      int4 parts[kHalves];
      unit.load(head, row, parts);
      int mean[kHalves];
#pragma unroll
      for (int e = 0; e < kHalves; ++e)
        mean[e] = unit.lane < unit.units ? means[(head * unit.units + unit.lane) * kHalves + e] : 0;
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        int whole[kHalves], with_mean = 0, with_itself = 0;
        whole_numbers<E>(parts[i], unit.lanes, whole);
#pragma unroll
        for (int e = 0; e < kHalves; ++e) {
          with_mean += whole[e] * mean[e];
          with_itself += whole[e] * whole[e];
        }
        with_mean = vector_sum(with_mean, unit.lanes);
        with_itself = vector_sum(with_itself, unit.lanes);
        likeness[i] = __fadd_rn(likeness[i], cosine(with_mean, with_itself, products[head]));
      }
    }
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int at = row + i * unit.groups;
      if (at >= unit.count) continue;
      const float2 key = {__uint_as_float(ordered(likeness[i])), __uint_as_float(unit.first + at)};
      for (int rank = unit.lane; rank < kSharers; rank += unit.lanes)
        ptx::store_to(rank, reinterpret_cast<float2*>(shared.keys + unit.first + at), key);
    }
  }
}

// The first CTA learns which of this one's candidates are among the `wanted` least like the mean.
__device__ __forceinline__ void pick(const Unit& unit, int wanted, Picking& shared) {
  // Two threads a candidate, each looks at half of all.
  const int half = threadIdx.x % 2, middle = unit.candidates / 2;
  const int begin = half ? middle : 0, end = half ? unit.candidates : middle;
#pragma unroll 1
  for (int base = 0; base < unit.count; base += kWide / 2) {
    const int at = base + static_cast<int>(threadIdx.x) / 2;
    const uint32_t own = shared.keys[unit.first + min(at, unit.count - 1)].x;
    int before = 0;
    for (int i = begin; i < end; ++i) {
      const uint32_t other = shared.keys[i].x;
      before += other < own || (other == own && i < unit.first + at);
    }
    before += __shfl_xor_sync(cta::kAllLanes, before, 1);
    if (half == 0 && at < unit.count)
      ptx::store_to_first(shared.picked + unit.first + at, before < wanted);
  }
}

// Strided sample `i` of `n` over the span.
__device__ __forceinline__ int strided(const Span& span, int i, int n) {
  if (n == 1) return span.len - 1;
  return static_cast<int>(static_cast<int64_t>(i) * (span.len - 1) / (n - 1));
}

// Merges the chosen tokens and the strided ones, ascending. One CTA.
__device__ __forceinline__ void write_samples(const Unit& unit, int count, int wanted,
                                              Picking& shared, int* samples) {
  constexpr int kEach = kCandidates / kWide;
  const int first = static_cast<int>(threadIdx.x) * kEach;
  int mine = 0;
  for (int i = 0; i < kEach; ++i) mine += first + i < unit.candidates && shared.picked[first + i];
  int to = cta::exclusive_sum(mine).before;
  for (int i = 0; i < kEach; ++i) {
    if (first + i < unit.candidates && shared.picked[first + i])
      shared.chosen[to++] = unit.token(first + i);
  }
  __syncthreads();
  const int even = count - wanted;
  for (int i = threadIdx.x; i < even; i += kWide) {
    const int token = strided(unit.span, i, even);
    int low = 0, high = wanted;  // chosen ones below the token
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.chosen[middle] < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    samples[i + low] = token;
  }
  for (int i = threadIdx.x; i < wanted; i += kWide) {
    const int token = shared.chosen[i];
    int low = 0, high = even;  // strided ones up to the token
    while (low < high) {
      const int middle = (low + high) / 2;
      if (strided(unit.span, middle, even) <= token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    samples[i + low] = token;
  }
}

template <class E>
__device__ __forceinline__ void sample_rows(const Step& step) {
  extern __shared__ int sums[];  // [heads, head_dim], then their means
  __shared__ Picking shared;
  __shared__ int products[64];
  ptx::wait_for_earlier();
  const int kv_head = blockIdx.y;
  const Span* span = scored_span(step, blockIdx.z);
  if (!span) return;
  const int count = samples_of(step, *span, 0).count, wanted = unusual_of(count);
  if (count == span->len) return;
  const Unit unit(step, *span, kv_head);
  const int length = unit.heads * step.layout.head_dim;
  if (wanted > 0) {
    for (int i = threadIdx.x; i < length; i += kWide) sums[i] = 0;
    __syncthreads();
    add_queries<E>(unit, sums);
    join_sums(sums, length);
    narrow(sums, products, unit.heads, step.layout.head_dim);
    compare<E>(unit, sums, products, shared);
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

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(256, 1)
    compactattn_sample_rows_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_rows<__nv_bfloat16>(step);
}

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(256, 1)
    compactattn_sample_rows_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_rows<__half>(step);
}
