// A consumer warpgroup that takes each tile of the stream in two halves, each with scores and P of
// its own: Q K^T of the next half and P V of the one before run beside the exponentials of this
// one, which so wait for no product. For head_dims at which exponentials take as long as products.
// All products end with each half: across turns of a loop the assembler cannot tell one group of
// them from another and serialises them.
#pragma once

#include "../../common/softmax.cuh"
#include "products.cuh"

namespace compactattn::sm90 {

template <class T>
struct HalvesConsumer {
  static constexpr int kHalfTokens = T::kTokens / 2;
  static_assert(!T::kSharedQueries && kTileTokens == T::kTokens);
  using Outputs = float[T::kOutputs];

  struct Half {
    float s[kHalfTokens / 2];
    uint32_t p[kHalfTokens / 16][4];
  };

  SharedStorage<T>& smem;
  Place at;
  float scale;  // sm_scale * log2(e)
  ptx::Ring<T::kKeyStages> k_ring;
  ptx::Ring<T::kValueStages> v_ring;
  Queries<T> q;
  Half halves[2];  // of a tile: its later tokens, which come first, and its earlier ones

  template <int kHalf>
  static __device__ __forceinline__ const uint8_t* part(const uint8_t* tile) {
    return tile + (kHalf == 0 ? kHalfTokens * T::kRowBytes : 0);
  }

  // What a step issues beside its exponentials.
  enum Products { kScoresOnly, kBoth, kValuesOnly };

  // P of half `kHalf` from its scores, beside Q K^T of the other half and P V of the other half.
  template <int kHalf, Products kProducts, bool kMasked>
  __device__ __forceinline__ void step(Outputs& o, RowState& rows, const int (&visible)[2]) {
    constexpr int kOther = 1 - kHalf;
    Half& mine = halves[kHalf];
    Half& other = halves[kOther];
    ptx::fence_registers(other.s);
    ptx::fence_registers(o);
    cute::warpgroup_arrive();
    if constexpr (kProducts != kValuesOnly) {
      issue_scores(other.s, q, part<kOther>(smem.k[k_ring.stage]));
    }
    if constexpr (kProducts != kScoresOnly) {
      issue_values<T>(o, other.p, part<kOther>(smem.v[v_ring.stage]));
    }
    cute::warpgroup_commit_batch();
    if constexpr (kMasked) {
      constexpr int kBefore = kHalf == 0 ? kHalfTokens : 0;
      const int seen[2] = {visible[0] - kBefore, visible[1] - kBefore};
      mask_scores(mine.s, seen);
    }
    float top[2], factor[2];
    tile_max(mine.s, top);
    const bool grown = raise_max<T>(top, scale, rows, factor);
    exponentiate<kMasked>(mine.s, scale, rows);
    pack<typename T::Element>(mine.s, mine.p);
    if constexpr (T::kHeldWait) ptx::wait_no_earlier(rows.sum[0] + rows.sum[1]);
    cute::warpgroup_wait<0>();
    ptx::fence_registers(other.s);
    ptx::fence_registers(o);
    if (grown) rescale(o, factor);
  }

  // The second half of a tile, whose first is weighed, and the first half of the next tile.
  template <bool kMasked>
  __device__ __forceinline__ void turn(Outputs& o, RowState& rows, int (&visible)[2]) {
    smem.v_full[v_ring.stage].wait(v_ring.phase);
    smem.k_full[k_ring.stage].wait(k_ring.phase);
    step<1, kBoth, kMasked>(o, rows, visible);
    visible[0] += T::kTokens;
    visible[1] += T::kTokens;
    step<0, kBoth, kMasked>(o, rows, visible);
    release_keys();
    release_values();
  }

  __device__ __forceinline__ void first_half(Outputs& o, RowState& rows, const int (&visible)[2]) {
    smem.k_full[k_ring.stage].wait(k_ring.phase);
    ptx::fence_registers(halves[0].s);
    cute::warpgroup_arrive();
    issue_scores(halves[0].s, q, part<0>(smem.k[k_ring.stage]));
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    ptx::fence_registers(halves[0].s);
    step<0, kScoresOnly, true>(o, rows, visible);
    release_keys();
  }

  __device__ __forceinline__ void last_half(Outputs& o, RowState& rows, const int (&visible)[2]) {
    smem.v_full[v_ring.stage].wait(v_ring.phase);
    step<1, kValuesOnly, true>(o, rows, visible);
    ptx::fence_registers(o);
    cute::warpgroup_arrive();
    issue_values<T>(o, halves[1].p, part<1>(smem.v[v_ring.stage]));
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    ptx::fence_registers(o);
    release_values();
  }

  __device__ __forceinline__ void release_keys() {
    release(smem.k_empty[k_ring.stage], at.lane);
    k_ring.advance();
  }

  __device__ __forceinline__ void release_values() {
    release(smem.v_empty[v_ring.stage], at.lane);
    v_ring.advance();
  }

  // O and row sums of one piece.
  __device__ __forceinline__ void attend(const Walkable& piece, int heads_per_list, Outputs& o,
                                         RowState& rows) {
    int visible[2];  // columns from the thread's first column of the current tile
    QueryRow mine[2];
    int tile = piece.end - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[r] = query_row(piece.item, heads_per_list, at.row + 8 * r);
      const int token = min(mine[r].token, piece.item.num_tokens - 1);
      visible[r] = piece.stream.visible + token - tile * T::kTokens - at.column;
    }
    load_queries<T>(q, smem.q, at, mine);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    release(smem.q_empty, at.lane);
    first_half(o, rows, visible);
    const int used = piece.stream.visible + piece.item.num_tokens - 1 - tile * T::kTokens;
    if (used < T::kTokens) {
      smem.v_full[v_ring.stage].wait(v_ring.phase);
      zero_tail<T>(smem.v[v_ring.stage], used, at.warpgroup);
    }
    // Tiles below this one are seen whole by every row.
    const int unmasked = max(piece.stream.visible, 0) / T::kTokens;
    for (; tile > piece.begin && tile >= unmasked; --tile) turn<true>(o, rows, visible);
    for (; tile > piece.begin; --tile) turn<false>(o, rows, visible);
    last_half(o, rows, visible);
  }
};

}  // namespace compactattn::sm90
