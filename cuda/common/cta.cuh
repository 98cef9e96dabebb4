// Sums over the threads of a CTA, 256 unless the translation unit says otherwise before it includes
// this. In integers only, so that their order cannot show.
#pragma once

#include <cstdint>

namespace compactattn::cta {

#ifndef COMPACTATTN_CTA_THREADS
#define COMPACTATTN_CTA_THREADS 256
#endif

constexpr int kThreads = COMPACTATTN_CTA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
static_assert(kWarps >= 8 && kWarps <= 32 && (kWarps & kWarps - 1) == 0, "a lane for each warp");

template <class Int>
struct Sum {
  Int before;  // over the threads before this one
  Int total;
};

// Sums over this lane and those below it, of the first `kLanes`.
template <int kLanes, class Int>
__device__ __forceinline__ Int lane_sum(Int x) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const Int below = __shfl_up_sync(kAllLanes, x, d);
    if (static_cast<int>(threadIdx.x % 32) >= d) x += below;
  }
  return x;
}

// What the warps before this one and all together hold, given each one's sum; a lane reads a
// warp's.
template <class Int>
__device__ __forceinline__ Sum<Int> sum_of_warps(const Int* warps) {
  const int warp = threadIdx.x / 32;
  const Int sum = lane_sum<kWarps>(warps[threadIdx.x % kWarps]);
  const Int before = __shfl_sync(kAllLanes, sum, max(0, warp - 1));
  return {warp > 0 ? before : 0, __shfl_sync(kAllLanes, sum, kWarps - 1)};
}

template <class Int>
__device__ Sum<Int> exclusive_sum(Int x) {
  __shared__ Int warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Int sum = lane_sum<32>(x);
  __syncthreads();  // the call before this one may still be read
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  const Sum<Int> out = sum_of_warps(warps);
  return {out.before + sum - x, out.total};
}

template <class Int>
__device__ Int total(Int x) {
  static_assert(sizeof(Int) == 4, "one instruction sums those of a warp");
  __shared__ Int warps[kWarps];
  x = __reduce_add_sync(kAllLanes, x);
  __syncthreads();  // the call before this one may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return __reduce_add_sync(kAllLanes, lane < kWarps ? warps[lane] : 0);
}

}  // namespace compactattn::cta
