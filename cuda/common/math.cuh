// Scalar arithmetic of the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../ptx/scalar.cuh"

namespace compactattn {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// Two elements in one word, `low` at the lower address; __nv_bfloat16 or __half.
template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Over the 4 lanes that hold one accumulator row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ uint32_t pick(const uint32_t (&w)[4], int i) {
  const uint32_t low = i & 1 ? w[1] : w[0];
  const uint32_t high = i & 1 ? w[3] : w[2];
  return i & 2 ? high : low;
}

// Transposes 4 words x 4 lanes: lane `i` of the quad ends with word `i` of each lane, in lane
// order.
__device__ __forceinline__ uint4 quad_transpose(const uint32_t (&w)[4], int lane_in_quad) {
  uint32_t got[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) got[s] = __shfl_xor_sync(0xffffffffu, pick(w, lane_in_quad ^ s), s);
  return {pick(got, lane_in_quad), pick(got, lane_in_quad ^ 1), pick(got, lane_in_quad ^ 2),
          pick(got, lane_in_quad ^ 3)};
}

}  // namespace compactattn
