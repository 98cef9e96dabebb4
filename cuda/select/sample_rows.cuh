// What sample_rows works on, and the arithmetic that all backends share (rust/select/sample.rs).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/std/type_traits>

#include "cells.cuh"
#include "cluster.cuh"

namespace compactattn::select {

constexpr int kMostCandidates = 512;
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

constexpr int kMostOfCta = kMostCandidates / kSharers;

struct Picking {
  uint32_t keys[kMostOfCta];  // of this CTA's candidates: lower is less like the mean
  // The first CTA's: of each CTA the keys of its best, ascending, and which candidates they are.
  uint32_t best_keys[kSharers][kMostOfCta];
  uint32_t best[kSharers][kMostOfCta];
  int32_t unsorted[kMostCandidates];  // the chosen candidates, best first
  int32_t chosen[kMostCandidates];    // their tokens, ascending
  float lengths[64];                  // of each head's mean
  float scales[kHeads];               // of each head's whole numbers
};

// floor(x * n / d), 0 <= x <= d: by 32 bits where those hold it, a fifth of the instructions.
__device__ __forceinline__ int scaled(int x, int n, int d) {
  if (n < 1 << 15 && d < 1 << 15) return static_cast<uint32_t>(x) * n / static_cast<uint32_t>(d);
  return static_cast<int>(static_cast<int64_t>(x) * n / d);
}

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
    candidates = min(span.len, kMostCandidates);
    const int rank = kSharers > 1 ? cluster_rank() : 0;
    first = min(candidates, rank * each());
    count = count_of(rank);
    lanes = units <= 8 ? 8 : units <= 16 ? 16 : 32;
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    groups = kWide / lanes;
  }

  // Candidates of a CTA, the last ones' fewer.
  __device__ __forceinline__ int each() const { return (candidates + kSharers - 1) / kSharers; }
  __device__ __forceinline__ int count_of(int rank) const {
    return max(0, min(each(), candidates - rank * each()));
  }

  __device__ __forceinline__ int token(int candidate) const {
    return scaled(candidate, span.len, candidates);
  }

  // Numbers of a sum of the group's queries.
  __device__ __forceinline__ int sums() const { return heads * kElements * lanes; }

  // This lane's part of the query of a token's head; zeros past the group's.
  __device__ __forceinline__ int4 load(int token, int head) const {
    if (head >= heads || lane >= units) return {};
    return __ldg(queries + token * token_stride + head * head_stride + lane);
  }

  // The same of heads from `head` on.
  __device__ __forceinline__ void load(int token, int head, int4 (&parts)[kHeads]) const {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) parts[i] = load(token, head + i);
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

__device__ __forceinline__ int whole_number(float x, float scale) {
  const float most = fminf(fmaxf(__fmul_rn(x, scale), -kMost), kMost);
  return __float_as_int(__fadd_rn(most, kRounding)) - __float_as_int(kRounding);
}

// What a lane has of a product of two vectors, eight elements one after the other: every step
// rounded, as on a host.
__device__ __forceinline__ float product_of(const Part& a, const Part& b) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kElements; ++e) sum = __fadd_rn(sum, __fmul_rn(a[e], b[e]));
  return sum;
}

// The product: those of the lanes, pair by pair.
__device__ __forceinline__ float dot(const Part& a, const Part& b, int lanes) {
  float sum = product_of(a, b);
  for (int d = 1; d < lanes; d *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(cta::kAllLanes, sum, d));
  return sum;
}

__device__ __forceinline__ void load_mean(const Unit& unit, const int* sums, int head, Part& mean) {
#pragma unroll
  for (int e = 0; e < kElements; ++e)
    mean[e] = head < unit.heads ? __int_as_float(sums[unit.at(head, e)]) : 0.0f;
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

}  // namespace compactattn::select
