// Tensor copies into shared memory and the barriers they complete on, as CUTLASS has them.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

namespace compactattn::ptx {

using Barrier = cutlass::arch::ClusterBarrier;
using CopyBarrier = cutlass::arch::ClusterTransactionBarrier;
using CacheHint = cute::TMA::CacheHintSm90;

// Asks for maps before they are first used.
template <class... Map>
__device__ __forceinline__ void prefetch(const Map&... maps) {
  (cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps)), ...);
}

// Tokens of one copy from a pool whose boxes have `box_tokens`: boxes of 32 rows of 128 bytes
// arrive a fifth slower than the same bytes as boxes of 16 (tests/bench/record/h100), so they go in
// halves. The host's maps obey the same rule.
__device__ __forceinline__ int copied_tokens(int box_tokens) {
  return box_tokens == 32 ? 16 : box_tokens;
}

// Where a box of the paged pool starts; the first coordinate, within 64 columns, is always 0.
struct PoolBox {
  int32_t token;    // in the page
  int32_t columns;  // group of 64
  int32_t kv_head;
  int32_t page;
};

__device__ __forceinline__ void load(const CUtensorMap& map, CopyBarrier& done, void* smem,
                                     PoolBox at, CacheHint hint = CacheHint::EVICT_LAST) {
  cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&done),
                               static_cast<uint64_t>(hint), smem, 0, at.token, at.columns,
                               at.kv_head, at.page);
}

// Where a query tile starts.
struct QueryBox {
  int32_t head;
  int32_t token;
  int32_t columns;  // group of 64
};

__device__ __forceinline__ void load(const CUtensorMap& map, CopyBarrier& done, void* smem,
                                     QueryBox at, CacheHint hint = CacheHint::EVICT_FIRST) {
  cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&done),
                               static_cast<uint64_t>(hint), smem, 0, at.head, at.token, at.columns);
}

// A place in a ring of `kStages` buffers; consumers wait on `phase`, producers on the opposite one.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace compactattn::ptx
