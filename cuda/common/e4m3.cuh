// e4m3 caches: what a stored byte is worth, and tiles that arrive as bytes and are multiplied as
// 16-bit elements.
//
// Copies leave the 16 bytes of 16 elements in the first half of the 32 bytes that those elements
// take once they are wide: the thread that copied them widens them in place, before others look.
#pragma once

#include "../params.h"
#include "../ptx/e4m3.cuh"
#include "math.cuh"

namespace compactattn {

// Bytes of a wide tile from one 16-byte copy of stored elements to the next.
template <class Stored>
constexpr int kCopyStep = 32 / sizeof(Stored);

// What stored keys, or values, of a KV head are multiplied by.
__device__ __forceinline__ float key_scale(const Batch& batch, int kv_head) {
  return batch.k_scale ? __ldg(batch.k_scale + kv_head * batch.k_scale_stride) : 1.0f;
}
__device__ __forceinline__ float value_scale(const Batch& batch, int kv_head) {
  return batch.v_scale ? __ldg(batch.v_scale + kv_head * batch.v_scale_stride) : 1.0f;
}

// Two elements of the 16-bit type from the two low bytes.
template <class Element>
__device__ __forceinline__ uint32_t widen_to(uint32_t pair);

template <>
__device__ __forceinline__ uint32_t widen_to<__half>(uint32_t pair) {
  const __half2 wide = ptx::widen_pair(pair);
  return reinterpret_cast<const uint32_t&>(wide);
}

template <>
__device__ __forceinline__ uint32_t widen_to<__nv_bfloat16>(uint32_t pair) {
  const float2 wide = __half22float2(ptx::widen_pair(pair));
  return pack_pair<__nv_bfloat16>(wide.x, wide.y);
}

// Widens 16 bytes at `at`, in shared memory, to the 32 bytes there; by the thread whose copy
// brought them, once it has arrived.
template <class Element>
__device__ __forceinline__ void widen_in_place(uint8_t* at) {
  const uint4 codes = *reinterpret_cast<const uint4*>(at);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = widen_to<Element>(words[i]);
    wide[2 * i + 1] = widen_to<Element>(words[i] >> 16);
  }
  reinterpret_cast<uint4*>(at)[0] = {wide[0], wide[1], wide[2], wide[3]};
  reinterpret_cast<uint4*>(at)[1] = {wide[4], wide[5], wide[6], wide[7]};
}

}  // namespace compactattn
