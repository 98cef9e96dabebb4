// 8-bit floats of KV caches (e4m3, finite but for one NaN of each sign) to 16-bit elements,
// exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace compactattn::ptx {

// Two halves from the two low bytes of `pair`, in their order.
__device__ __forceinline__ __half2 widen_pair(uint32_t pair) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  return reinterpret_cast<const __half2&>(halves);
#else
  // Exponent and mantissa move to where a half has them, 8 below its bias.
  const uint32_t bytes = __byte_perm(pair, 0, 0x1404);
  const uint32_t halves = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> 1;
  const __half2 wide = __hmul2(reinterpret_cast<const __half2&>(halves), __float2half2_rn(256.0f));
  // All ones is NaN, not 480.
  const uint32_t size = bytes & 0x7f007f00u;
  uint32_t out = reinterpret_cast<const uint32_t&>(wide);
  if ((size & 0xffffu) == 0x7f00u) out |= 0x7fffu;
  if (size >> 16 == 0x7f00u) out |= 0x7fff0000u;
  return reinterpret_cast<const __half2&>(out);
#endif
}

}  // namespace compactattn::ptx
