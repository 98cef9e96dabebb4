// Tile shapes and shared memory of the sm_90a attend kernel, by head_dim. Each number says why it
// is what it is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../ptx/tma.cuh"

namespace compactattn::sm90 {

// 128 query rows walk the stream `kTokens` at a time: a divisor of plan's tiles of 128, which are a
// whole number of boxes of every page size, so that paging never reaches the matrix products.
template <class E, int kDim, int kTokens_, int kKeyStages_, int kValueStages_, int kQuerySteps_>
struct Tile {
  using Element = E;  // __nv_bfloat16 or __half
  static constexpr int kHeadDim = kDim;
  static constexpr int kRows = 128;  // two consumer warpgroups of 64
  static constexpr int kTokens = kTokens_;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kKeyStages = kKeyStages_;
  static constexpr int kValueStages = kValueStages_;
  static_assert(sizeof(E) == 2);
  // Of 16 columns each. Q in registers spares shared memory reads; what they cannot hold is read
  // from shared memory by each product.
  static constexpr int kDimSteps = kDim / 16;
  static constexpr int kQuerySteps = kQuerySteps_;  // in registers
  static constexpr bool kSharedQueries = kQuerySteps < kDimSteps;
  static constexpr int kTokenSteps = kTokens / 16;
  // Accumulators of a thread.
  static constexpr int kScores = kTokens / 2;
  static constexpr int kOutputs = kDim / 2;
  static constexpr int kColumns = 64;  // of 2 bytes = 128 B, the widest swizzle
  static constexpr int kGroups = kHeadDim / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kKvGroupBytes = kTokens * kRowBytes;
  static constexpr int kQGroupBytes = kRows * kRowBytes;
  static constexpr int kKvTileBytes = kGroups * kKvGroupBytes;
  static constexpr int kQTileBytes = kGroups * kQGroupBytes;
  static_assert(kSharedQueries || kQTileBytes <= kKvTileBytes, "queries come as a tile of keys");
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // 40 * 128 + 232 * 256 = 168 * 384, the registers at launch; 24 / 240 spills in the producers.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  // The old row maximum stays until a row grows by this many powers of two: P <= 2^8 is exact
  // enough in bf16 and the final division removes the factor (FlashAttention-4, arXiv 2603.05451).
  // 0 rescales always.
  static constexpr float kRescaleAbove = 8.0f;
  // P of tiles that every row sees goes by maxima of tiles before, without a look at its own.
  static constexpr bool kAhead = false;
  static constexpr bool kHeldWait = false;  // then: P V is waited for behind the exponentials
  static constexpr bool kTurns = false;     // warpgroups issue products in turn
  static constexpr bool kMeans = false;
  // Loads of each other part's rows, of 4 registers: what the accumulators leave room for.
  static constexpr int kMeetAtOnce = kOutputs > 64 ? 4 : 8;
};

// The same with mean correction: a kernel of its own, for what it adds would cost the others
// registers.
template <class T>
struct Corrected : T {
  static constexpr bool kMeans = true;
};

// As many stages as 227 KB hold. Ahead and in turns 14 % faster than neither, of which
// turns are 9; held waits cost 2 %.
template <class E, int kHeadDim>
struct TileOf;
template <class E>
struct TileOf<E, 64> : Tile<E, 64, 128, 7, 6, 4> {
  static constexpr bool kAhead = true;
  static constexpr bool kTurns = true;
};
// Ahead and held 8 to 14 % faster than neither, 5 of them held; turns cost 1 to 5 %. With three
// stages of each, boxes of 16 tokens came too late by 4 to 20 %, depending on how the compiler had
// ordered the step; a fourth of values instead of keys is as good
// (tests/bench/record/h100/2026-11-22-page16.txt).
template <class E>
struct TileOf<E, 128> : Tile<E, 128, 128, 4, 3, 8> {
  static constexpr bool kAhead = true;
  static constexpr bool kHeldWait = true;
};
// O takes 128 registers a thread: 64 tokens a step, and Q in shared memory (6 of its 16 steps in
// registers were no faster). The room for a fifth stage is V's, which is given back later in a step
// than K: the other way round costs 6 %, as does leaving it (tests/bench/record/h100). Maxima of
// tiles before gain nothing beside so many products.
template <class E>
struct TileOf<E, 256> : Tile<E, 256, 64, 2, 3, 0> {};

// A number that is read no earlier than barriers before the read: the assembler sinks an arrival
// below arithmetic that does not wait for it, but moves no read of memory over one.
struct OrderedScale {
  float value;

  __device__ __forceinline__ float after_barriers() const {
    return *static_cast<const volatile float*>(&value);
  }
};

// Queries that products read from shared memory; others come through the ring of keys, as a piece's
// first tile.
template <class T, bool kShared = T::kSharedQueries>
struct QueryTile {};
template <class T>
struct QueryTile<T, true> {
  alignas(1024) uint8_t q[T::kQTileBytes];
};

template <class T>
struct SharedStorage : QueryTile<T> {
  alignas(1024) uint8_t k[T::kKeyStages][T::kKvTileBytes];
  alignas(1024) uint8_t v[T::kValueStages][T::kKvTileBytes];
  ptx::CopyBarrier q_full;  // of shared queries
  ptx::CopyBarrier k_full[T::kKeyStages];
  ptx::CopyBarrier v_full[T::kValueStages];
  ptx::Barrier q_empty;
  ptx::Barrier k_empty[T::kKeyStages];
  ptx::Barrier v_empty[T::kValueStages];
  OrderedScale scale;  // sm_scale * log2(e)
};

// What host code asks for at launch; 232448 is what one CTA may have.
static_assert(sizeof(SharedStorage<TileOf<__half, 64>>) == 214016);
static_assert(sizeof(SharedStorage<TileOf<__half, 128>>) == 230400);
static_assert(sizeof(SharedStorage<TileOf<__half, 256>>) == 230400);

}  // namespace compactattn::sm90
