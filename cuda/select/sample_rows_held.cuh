// sample_rows where a thread's registers hold its candidates' queries: each is loaded once, and the
// sums of a cluster's CTAs meet once.
#pragma once

#include "sample_rows.cuh"

namespace compactattn::select {

constexpr int kHeldRows = 2;
constexpr int kHeldSums = 512;  // of a group, at most: numbers
static_assert(4 * kHeldSums * (1 + kWide / 32 + kCtas) == kHeldSamplesBytes, "a launch's");

// For the whole cluster.
__device__ __forceinline__ bool is_held(const Unit& unit) {
  const int each = (unit.candidates + kSharers - 1) / kSharers;
  return kSharers > 1 && unit.heads <= kHeads && unit.sums() <= kHeldSums &&
         each <= kHeldRows * unit.groups;
}

// A row is a candidate of this CTA: rows `group`, `group` + `groups` .. are a thread's.
struct Held {
  int4 parts[kHeldRows][kHeads];

  __device__ __forceinline__ explicit Held(const Unit& unit) {
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const int row = min(unit.first + unit.group + r * unit.groups, unit.candidates - 1);
      unit.load(unit.token(row), 0, parts[r]);
    }
  }
};

// Each warp's sums of its rows, in units of the head's first candidate: [warps, sums].
template <class E>
__device__ __forceinline__ void add_held(const Unit& unit, const Held& held, int* of_warps) {
  int4 first[kHeads];
  unit.load(0, 0, first);
  int* own = of_warps + threadIdx.x / 32 * kHeldSums;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i >= unit.heads) break;
    Part x;
    widen<E>(first[i], x);
    const float scale = scale_of(x, unit.lanes);
    int sum[kElements] = {};
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const bool counts = unit.group + r * unit.groups < unit.count;
      widen<E>(held.parts[r][i], x);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum[e] += counts ? whole_number(x[e], scale) : 0;
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      for (int d = unit.lanes; d < 32; d *= 2) sum[e] += __shfl_xor_sync(cta::kAllLanes, sum[e], d);
      if (threadIdx.x % 32 < unit.lanes) own[unit.at(i, e)] = sum[e];
    }
  }
  __syncthreads();
}

// Of kMany sets of sums, one after the other, the sum of this thread's number.
template <int kMany>
__device__ __forceinline__ int sum_of(const int* sets) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kMany; ++i) sum += sets[i * kHeldSums + threadIdx.x];
  return sum;
}

// Gives this CTA's sums to all: [CTAs, sums]. All have arrived at the cluster's barrier once.
__device__ __forceinline__ void send_sums(const Unit& unit, const int* of_warps, int* of_ctas) {
  ptx::wait_for_cluster();
  if (static_cast<int>(threadIdx.x) < unit.sums()) {
    const int sum = sum_of<kWide / 32>(of_warps);
    int* own = of_ctas + cluster_rank() * kHeldSums + threadIdx.x;
    uint32_t* to = reinterpret_cast<uint32_t*>(own);
#pragma unroll
    for (int rank = 0; rank < kSharers; ++rank) ptx::store_to(rank, to, sum);
  }
  ptx::fence_cluster();
  __syncwarp();
  ptx::arrive_at_cluster();
}

// What all CTAs have sent, as floats.
__device__ __forceinline__ void receive_sums(const Unit& unit, const int* of_ctas, int* sums) {
  ptx::wait_for_cluster();
  if (static_cast<int>(threadIdx.x) < unit.sums())
    sums[threadIdx.x] = __float_as_int(__int2float_rn(sum_of<kSharers>(of_ctas)));
  __syncthreads();
}

// Every CTA learns how like the mean this one's candidates are.
template <class E>
__device__ __forceinline__ void compare_held(const Unit& unit, int* dynamic, Picking& shared) {
  int *of_warps = dynamic + kHeldSums, *of_ctas = of_warps + kWide / 32 * kHeldSums;
  ptx::arrive_at_cluster();
  const Held held(unit);
  add_held<E>(unit, held, of_warps);
  send_sums(unit, of_warps, of_ctas);
  // Lane i of four knows head i's: a quarter of the roots and divisions.
  float squares[kHeldRows] = {}, products[kHeldRows] = {}, length = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      Part x;
      widen<E>(held.parts[r][i], x);
      const float square = dot(x, x, unit.lanes);
      if (unit.lane % kHeads == i) squares[r] = square;
    }
  }
  receive_sums(unit, of_ctas, dynamic);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    Part mean;
    load_mean(unit, dynamic, i, mean);
    const float squared = dot(mean, mean, unit.lanes);
    if (unit.lane % kHeads == i) length = __fsqrt_rn(squared);
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      Part x;
      widen<E>(held.parts[r][i], x);
      const float product = dot(x, mean, unit.lanes);
      if (unit.lane % kHeads == i) products[r] = product;
    }
  }
#pragma unroll
  for (int r = 0; r < kHeldRows; ++r) {
    const float mine = cosine(products[r], squares[r], length);
    float likeness = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const float other = __shfl_sync(cta::kAllLanes, mine, i, kHeads);
      if (i < unit.heads) likeness = __fadd_rn(likeness, other);
    }
    const int row = unit.group + r * unit.groups;
    if (row < unit.count && unit.lane < kSharers)
      ptx::store_to(unit.lane, shared.keys + unit.first + row, ordered(likeness));
  }
}

}  // namespace compactattn::select
