// Sums and maxima over the 1024 threads of a CTA of plan. In integers only.
#pragma once

#include <cstdint>

namespace compactattn {

constexpr int kPlanThreads = 1024;
constexpr int kPlanWarps = kPlanThreads / 32;
static_assert(kPlanWarps == 32, "a lane for each warp");

template <class T>
struct Scan {
  T before;  // over the threads before this one
  T total;
};

template <class T>
__device__ __forceinline__ T of_lane_below(T x, int distance) {
  return __shfl_up_sync(0xffffffffu, x, distance);
}

template <class T>
__device__ __forceinline__ T of_lane(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

template <class T, class Op>
__device__ __forceinline__ T scan_lanes(T x, Op op) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = of_lane_below(x, d);
    if (static_cast<int>(threadIdx.x) % 32 >= d) x = op(below, x);
  }
  return x;
}

// Threads from `count` on have `zero`, which is neutral to `op`: their warps have nothing to do,
// and what idles does not slow the others; they may have left. A kernel calls it once for each T
// and op: nobody waits until `warps` can be overwritten.
template <class T, class Op>
__device__ Scan<T> scan(T x, T zero, Op op, int count) {
  __shared__ T warps[kPlanWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T before = zero;
  if (warp * 32 < count || warp == 0) {  // none at all: a total of zero
    const T through = scan_lanes(x, op);
    if (lane == 31) warps[warp] = through;
    const T below = of_lane_below(through, 1);
    if (lane > 0) before = below;
  }
  __syncthreads();
  if (count <= 32) return {before, warps[0]};
  const T sums = scan_lanes(lane * 32 < count ? warps[lane] : zero, op);
  const T others = of_lane(sums, (warp + 31) % 32);
  return {warp > 0 ? op(others, before) : before, of_lane(sums, 31)};
}

template <class T>
__device__ __forceinline__ Scan<T> scan_sum(T x, int count) {
  return scan(x, T{}, [](const T& a, const T& b) { return a + b; }, count);
}

// The same of words: sums over warps are one instruction each.
__device__ __forceinline__ Scan<uint32_t> scan_sum(uint32_t x, int count) {
  __shared__ uint32_t warps[kPlanWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t through = scan_lanes(x, [](uint32_t a, uint32_t b) { return a + b; });
  if (lane == 31) warps[warp] = through;
  __syncthreads();
  const uint32_t sum = lane * 32 < count ? warps[lane] : 0;
  return {through - x + __reduce_add_sync(0xffffffffu, lane < warp ? sum : 0),
          __reduce_add_sync(0xffffffffu, sum)};
}

}  // namespace compactattn
