// Tile shapes and shared memory of the sm_80 attend kernel, by head_dim. Each number says why it is
// what it is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../params.h"

namespace compactattn::sm80 {

// `kWarps` warps of `kBlocks` blocks of 16 query rows walk the stream `kTokens` at a time.
template <class E, int kDim, int kWarps_, int kTokens_, int kStages_>
struct Tile {
  using Element = E;  // __nv_bfloat16 or __half
  static constexpr int kHeadDim = kDim;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 128;
  static constexpr int kWarpRows = kRows / kWarps;
  static constexpr int kBlocks = kWarpRows / 16;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;       // buffers of K and of V, 1 or 2
  static constexpr int kCtasPerSm = 8 / kWarps;  // 255 registers a thread
  static constexpr int kChunks = kDim / 8;       // of 16 bytes, a row
  // An odd number of chunks: eight rows below each other then lie in different banks, as with a
  // swizzle, and all addresses are a constant apart.
  static constexpr int kRowBytes = 16 * (kChunks + 1);
  static constexpr int kKvTileBytes = kTokens * kRowBytes;
  static constexpr int kSharedBytes = kRows * kRowBytes + 2 * kStages * kKvTileBytes;
  // Lanes that copy one row; with head_dim 96 a quarter of them idles.
  static constexpr int kRowLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  static constexpr int kLaneRows = kTokens * kRowLanes / kThreads;  // consecutive
  // The same of the pool, whose elements may be narrower than those that are multiplied.
  using Stored = E;
  static constexpr int kPoolChunks = kChunks;
  static constexpr int kPoolRowLanes = kRowLanes;
  static constexpr int kPoolLaneRows = kLaneRows;
  // The old row maximum stays until a row grows by this many powers of two (as sm90/traits.h).
  static constexpr float kRescaleAbove = 8.0f;
  static constexpr bool kMeans = false;
  static_assert(sizeof(E) == 2 && kChunks % 2 == 0 && 16 * kBlocks * kWarps == kRows);
  static_assert(kLaneRows >= 1 && (kLaneRows & (kLaneRows - 1)) == 0);
};

// The same with mean correction: a kernel of its own, for what it adds would cost the others
// registers.
template <class T>
struct Corrected : T {
  static constexpr bool kMeans = true;
};

// The same over a pool of e4m3.
template <class T>
struct OverE4m3 : T {
  using Stored = E4m3;
  static constexpr int kPoolChunks = T::kHeadDim / 16;
  static constexpr int kPoolRowLanes = kPoolChunks;
  static constexpr int kPoolLaneRows = T::kTokens * kPoolRowLanes / T::kThreads;
  static_assert(kPoolLaneRows >= 1 && (kPoolLaneRows & (kPoolLaneRows - 1)) == 0);
};

// A CTA may have 227 KB of shared memory on sm_90, where these tiles were measured; 163 KB on
// sm_80, 99 KB on sm_86, sm_89 and sm_120: elsewhere the tiles fit the least of these.
#ifndef COMPACTATTN_ROOMY
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9
#define COMPACTATTN_ROOMY 1
#else
#define COMPACTATTN_ROOMY 0
#endif
#endif
constexpr bool kRoomy = COMPACTATTN_ROOMY;

// 32 rows a warp where the registers hold them: K and V fragments then serve two products each, and
// shared memory is read half as often. Shorter steps, and Q K^T beside exponentials in one warp,
// were slower (tests/bench/record/h100).
template <class E, int kHeadDim>
struct TileOf;
template <class E>
struct TileOf<E, 64> : Tile<E, 64, 4, 128, kRoomy ? 2 : 1> {};
template <class E>
struct TileOf<E, 96> : Tile<E, 96, 4, 64, kRoomy ? 2 : 1> {};
template <class E>
struct TileOf<E, 128> : Tile<E, 128, 4, 64, kRoomy ? 2 : 1> {};
template <class E>
struct TileOf<E, 256> : Tile<E, 256, 8, kRoomy ? 64 : 32, kRoomy ? 2 : 1> {};

// What host code asks for at launch.
static_assert(TileOf<__half, 64>::kSharedBytes == (kRoomy ? 92160 : 55296));
static_assert(TileOf<__half, 96>::kSharedBytes == (kRoomy ? 79872 : 53248));
static_assert(TileOf<__half, 128>::kSharedBytes == (kRoomy ? 104448 : 69632));
static_assert(TileOf<__half, 256>::kSharedBytes == (kRoomy ? 202752 : 101376));

}  // namespace compactattn::sm80
