// Sums over the 256 threads of a CTA. In integers only, so that their order cannot show.
#pragma once

#include <cstdint>

namespace compactattn::cta {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

template <class Int>
struct Sum {
  Int before;  // over the threads before this one
  Int total;
};

template <class Int>
__device__ Sum<Int> exclusive_sum(Int x) {
  __shared__ Int warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Int sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Int below = __shfl_up_sync(kAllLanes, sum, d);
    if (lane >= d) sum += below;
  }
  __syncthreads();  // the call before this one may still be read
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Sum<Int> out{sum - x, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) out.before += warps[w];
    out.total += warps[w];
  }
  return out;
}

template <class Int>
__device__ Int total(Int x) {
  __shared__ Int warps[kWarps];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  __syncthreads();  // the call before this one may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  Int sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += warps[w];
  return sum;
}

}  // namespace compactattn::cta
