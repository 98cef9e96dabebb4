// Tile shapes and shared memory of the sm_90a cells reader, by head_dim.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../ptx/tma.cuh"

namespace compactattn::select::sm90 {

// 128 sampled rows of each of `kSpans` neighbouring select spans, 64 a consumer warpgroup, meet
// `kTokens` keys at a time. Where there is one span, two teams of warpgroups take tiles in turn.
// `kStages` tiles are under way: memory answers after about 1 us, in which one SM's share of its
// bandwidth is 25 KB.
template <class E, int kDim, int kTokens_, int kSpans_, int kStages_>
struct KeyTile {
  using Element = E;  // __nv_bfloat16 or __half
  static_assert(sizeof(E) == 2);
  static constexpr int kHeadDim = kDim;
  static constexpr int kTokens = kTokens_;
  static constexpr int kSpans = kSpans_;
  static constexpr int kTeams = 2 / kSpans;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 128 * kSpans;
  static constexpr int kRowParts = kRows / 64;       // of the rows
  static constexpr int kParts = kTeams * kRowParts;  // a consumer warpgroup each
  static_assert(kTeams == 1 || kStages % kTeams == 0, "a stage is one team's");
  static constexpr int kLogits = kTokens / 2;  // of a thread
  static constexpr int kColumns = 64;          // of 2 bytes = 128 B, the widest swizzle
  static constexpr int kGroups = kDim / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kKeyGroupBytes = kTokens * kRowBytes;
  static constexpr int kQueryGroupBytes = kRows * kRowBytes;
  static constexpr int kKeyBytes = kGroups * kKeyGroupBytes;
  static constexpr int kQueryBytes = kGroups * kQueryGroupBytes;
  static constexpr int kConsumerWarps = 4 * kParts;
  // Of which the first after the consumers copies; registers change hands by whole warpgroups.
  static constexpr int kWarps = kConsumerWarps + 4;
  static constexpr int kThreads = 32 * kWarps;
  // Of a thread, once the warps know their roles.
  static constexpr int kConsumerRegisters = 112;
  static constexpr int kProducerRegisters = 32;
  static_assert(kConsumerRegisters * 32 * kConsumerWarps + kProducerRegisters * 128 <=
                    65536 / kThreads / 8 * 8 * kThreads,
                "a CTA never has more than it starts with");
};

// As many stages as 227 KB hold beside the queries.
template <class E, int kDim, int kSpans = 1>
struct KeyTileOf;
template <class E>
struct KeyTileOf<E, 64> : KeyTile<E, 64, 128, 1, 12> {};
template <class E>
struct KeyTileOf<E, 128> : KeyTile<E, 128, 128, 1, 6> {};
template <class E>
struct KeyTileOf<E, 256> : KeyTile<E, 256, 64, 1, 4> {};
template <class E>
struct KeyTileOf<E, 64, 2> : KeyTile<E, 64, 128, 2, 12> {};
template <class E>
struct KeyTileOf<E, 128, 2> : KeyTile<E, 128, 128, 2, 5> {};
template <class E>
struct KeyTileOf<E, 256, 2> : KeyTile<E, 256, 64, 2, 3> {};

}  // namespace compactattn::select::sm90
