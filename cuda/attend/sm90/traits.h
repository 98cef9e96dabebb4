// Tile shapes and shared memory of the sm_90a attend kernel. Each number says why it is what it is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../ptx/tma.cuh"

namespace compactattn::sm90 {

// 16-bit elements, head_dim 128, 128 query rows x 128 KV tokens. 128 tokens are a whole number of
// boxes of every page size, so paging never reaches the matrix products.
template <class E>
struct D128 {
  using Element = E;  // __nv_bfloat16 or __half
  static constexpr int kHeadDim = 128;
  static constexpr int kRows = 128;  // two consumer warpgroups of 64
  static constexpr int kTokens = 128;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kStages = 3;     // K tiles and V tiles each; what 227 KB hold beside Q
  static_assert(sizeof(E) == 2);
  static constexpr int kColumns = 64;  // of 2 bytes = 128 B, the widest swizzle
  static constexpr int kGroups = kHeadDim / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kKvGroupBytes = kTokens * kRowBytes;
  static constexpr int kQGroupBytes = kRows * kRowBytes;
  static constexpr int kKvTileBytes = kGroups * kKvGroupBytes;
  static constexpr int kQTileBytes = kGroups * kQGroupBytes;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // 40 * 128 + 232 * 256 = 168 * 384, the registers at launch; 24 / 240 spills in the producers.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  // The old row maximum stays until a row grows by this many powers of two: P <= 2^8 is exact
  // enough in bf16 and the final division removes the factor (FlashAttention-4, arXiv 2603.05451).
  // 0 rescales always.
  static constexpr float kRescaleAbove = 8.0f;
};

using Bf16D128 = D128<__nv_bfloat16>;
using Fp16D128 = D128<__half>;

template <class T>
struct SharedStorage {
  alignas(1024) uint8_t q[T::kQTileBytes];
  alignas(1024) uint8_t k[T::kStages][T::kKvTileBytes];
  alignas(1024) uint8_t v[T::kStages][T::kKvTileBytes];
  ptx::CopyBarrier q_full;
  ptx::CopyBarrier k_full[T::kStages];
  ptx::CopyBarrier v_full[T::kStages];
  ptx::Barrier q_empty;
  ptx::Barrier k_empty[T::kStages];
  ptx::Barrier v_empty[T::kStages];
};
static_assert(sizeof(SharedStorage<Bf16D128>) <= 232448, "227 KB is what one CTA may have");

}  // namespace compactattn::sm90
