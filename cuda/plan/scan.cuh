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

// `zero` is neutral to `op`.
template <class T, class Op>
__device__ __forceinline__ T scan_lanes(T x, Op op) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, x, d);
    if (static_cast<int>(threadIdx.x) % 32 >= d) x = op(below, x);
  }
  return x;
}

template <class T, class Op>
__device__ Scan<T> scan(T x, T zero, Op op) {
  __shared__ T warps[kPlanWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T through = scan_lanes(x, op);
  __syncthreads();  // the call before this one may still be read
  if (lane == 31) warps[warp] = through;
  __syncthreads();
  const T sums = scan_lanes(warps[lane], op);
  const T below = __shfl_up_sync(0xffffffffu, through, 1);
  const T others = __shfl_sync(0xffffffffu, sums, (warp + 31) % 32);
  const T first = lane > 0 ? below : zero;
  return {warp > 0 ? op(others, first) : first, __shfl_sync(0xffffffffu, sums, 31)};
}

template <class T>
__device__ __forceinline__ Scan<T> scan_sum(T x) {
  return scan(x, T{0}, [](T a, T b) { return a + b; });
}

}  // namespace compactattn
