// Warpgroup matrix products on CUTLASS's atoms, with accumulators as plain arrays and descriptors
// as one addition.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <utility>

namespace compactattn::ptx {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;
namespace gmma = cute::SM90::GMMA;

// CUTLASS's atoms d[64 x N] += a[64 x 16] b[16 x N], a in registers or in shared memory.
template <class Element, int N, Major kRight>
struct RegisterAtom;
template <class Element, int N, Major kRight>
struct SharedAtom;

#define COMPACTATTN_ATOM(element, name, n)                                                         \
  template <Major kRight>                                                                          \
  struct RegisterAtom<element, n, kRight>                                                          \
      : gmma::MMA_64x##n##x16_F32##name##_RS<Major::K, kRight> {};                                 \
  template <Major kRight>                                                                          \
  struct SharedAtom<element, n, kRight> : gmma::MMA_64x##n##x16_F32##name##_SS<Major::K, kRight> { \
  }
COMPACTATTN_ATOM(__nv_bfloat16, BF16BF16, 64);
COMPACTATTN_ATOM(__half, F16F16, 64);
COMPACTATTN_ATOM(__nv_bfloat16, BF16BF16, 128);
COMPACTATTN_ATOM(__half, F16F16, 128);
COMPACTATTN_ATOM(__nv_bfloat16, BF16BF16, 256);
COMPACTATTN_ATOM(__half, F16F16, 256);
#undef COMPACTATTN_ATOM

// A 128-byte-swizzled operand. `next_128_bytes`: bytes between the 64-element column groups of an
// operand whose long side is contiguous (V); unused, 16, where the reduced side is contiguous (K).
// Atoms of 8 rows are 1 KB apart.
__device__ __forceinline__ uint64_t swizzled_operand(const void* smem,
                                                     uint32_t next_128_bytes = 16) {
  cute::GmmaDescriptor desc;
  desc.bitfield.start_address_ = static_cast<uint16_t>(cute::cast_smem_ptr_to_uint(smem) >> 4);
  desc.bitfield.leading_byte_offset_ = static_cast<uint16_t>(next_128_bytes >> 4);
  desc.bitfield.stride_byte_offset_ = 1024 >> 4;
  desc.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return desc.desc_;
}

// The operand `bytes` further on; never crosses the 14 address bits, for shared memory ends below
// 256 KB.
__device__ __forceinline__ uint64_t advanced(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

template <class Element, Major kRight, int... I>
__device__ __forceinline__ void fma_all(float (&d)[sizeof...(I)], const uint32_t (&a)[4],
                                        uint64_t b, ScaleOut keep,
                                        std::integer_sequence<int, I...>) {
  using Atom = RegisterAtom<Element, 2 * sizeof...(I), kRight>;
  Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., keep);
}

template <class Element, Major kRight, int... I>
__device__ __forceinline__ void fma_all(float (&d)[sizeof...(I)], uint64_t a, uint64_t b,
                                        ScaleOut keep, std::integer_sequence<int, I...>) {
  SharedAtom<Element, 2 * sizeof...(I), kRight>::fma(a, b, d[I]..., keep);
}

// d[64 x 2 M] (+)= a[64 x 16] b[16 x 2 M], M = 32, 64 or 128; a in registers, or an operand in
// shared memory. `kRight` says which side of b is contiguous, `keep` Zero drops the old d.
template <class Element, Major kRight, int M, class Left>
__device__ __forceinline__ void mma(float (&d)[M], const Left& a, uint64_t b, ScaleOut keep) {
  fma_all<Element, kRight>(d, a, b, keep, std::make_integer_sequence<int, M>{});
}

// Keeps ordinary reads and writes of `d` on their side of the asynchronous products.
template <int M>
__device__ __forceinline__ void fence_registers(float (&d)[M]) {
#pragma unroll
  for (int i = 0; i < M; ++i) cute::warpgroup_fence_operand(d[i]);
}

}  // namespace compactattn::ptx
