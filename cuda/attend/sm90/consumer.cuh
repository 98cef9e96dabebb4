// A consumer warpgroup that takes the stream tile by tile: Q K^T of a tile beside P V of the one
// before it.
#pragma once

#include "../../common/softmax.cuh"
#include "products.cuh"

namespace compactattn::sm90 {

template <class T>
struct Consumer {
  using Scores = float[T::kScores];
  using Outputs = float[T::kOutputs];
  using Weights = uint32_t[T::kTokenSteps][4];

  SharedStorage<T>& smem;
  Place at;
  float scale;         // sm_scale * log2(e)
  const Means* means;  // of kernels that correct
  ptx::Ring<T::kKeyStages> k_ring;
  ptx::Ring<T::kValueStages> v_ring;
  Queries<T> q;

  // The piece's first tile: scores and P; nothing to overlap with yet.
  template <Kind kKind>
  __device__ __forceinline__ void first_tile(Scores& s, Weights& p, RowState& rows,
                                             const Columns<T>& columns) {
    smem.k_full[k_ring.stage].wait(k_ring.phase);
    ptx::fence_registers(s);
    cute::warpgroup_arrive();
    issue_scores(s, q, smem.k[k_ring.stage]);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    ptx::fence_registers(s);
    release(smem.k_empty[k_ring.stage], at.lane);
    k_ring.advance();
    float factor[2];
    raise_for<T, kKind>(s, scale, rows, columns, at.column, factor);
    exponentiate<true>(s, scale, rows, kKind == Kind::kMeans ? columns.bias : 0.0f);
    pack<typename T::Element>(s, p);
  }

  // Scores of the next tile beside O += P V of the last one.
  template <Kind kKind>
  __device__ __forceinline__ void step(Scores& s, Outputs& o, Weights& p, RowState& rows,
                                       const Columns<T>& columns) {
    // Both waits stand before the products: a branch between them costs a second fence. V was asked
    // for long before K.
    smem.v_full[v_ring.stage].wait(v_ring.phase);
    smem.k_full[k_ring.stage].wait(k_ring.phase);
    ptx::fence_registers(s);
    ptx::fence_registers(o);
    cute::warpgroup_arrive();
    issue_scores(s, q, smem.k[k_ring.stage]);
    cute::warpgroup_commit_batch();
    issue_values<T>(o, p, smem.v[v_ring.stage]);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    ptx::fence_registers(s);
    release(smem.k_empty[k_ring.stage], at.lane);
    k_ring.advance();
    float factor[2];
    const bool grown = raise_for<T, kKind>(s, scale, rows, columns, at.column, factor);
    exponentiate<kKind != Kind::kWhole>(s, scale, rows,
                                        kKind == Kind::kMeans ? columns.bias : 0.0f);
    cute::warpgroup_wait<0>();
    ptx::fence_registers(o);
    release(smem.v_empty[v_ring.stage], at.lane);
    v_ring.advance();
    pack<typename T::Element>(s, p);
    if (grown) rescale(o, factor);
  }

  // The next piece's may come.
  __device__ __forceinline__ void release_queries() {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    release(smem.q_empty, at.lane);
  }

  __device__ __forceinline__ void last_values(Outputs& o, const Weights& p) {
    smem.v_full[v_ring.stage].wait(v_ring.phase);
    ptx::fence_registers(o);
    cute::warpgroup_arrive();
    issue_values<T>(o, p, smem.v[v_ring.stage]);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    ptx::fence_registers(o);
    release(smem.v_empty[v_ring.stage], at.lane);
    v_ring.advance();
  }

  // What a tile of means needs of the list.
  __device__ __forceinline__ void ask_list(const Skipped& skipped, const LoadedPiece& piece,
                                           int tile, Columns<T>& columns) const {
    const int64_t row = static_cast<int64_t>(piece.item.list_row) * means->mask_words;
    const uint32_t* bits = means->lists + row + tile * columns.kWords;
    columns.left = skipped.blocks - tile * T::kTokens;
    columns.bias = static_cast<float>(means->log2_block_tokens);
#pragma unroll
    for (int i = 0; i < columns.kWords; ++i)
      columns.listed[i] = i * 32 < columns.left ? __ldg(bits + i) : 0;
  }

  // O and row sums of one piece.
  __device__ __forceinline__ void attend(const LoadedPiece& piece, int heads_per_list, Outputs& o,
                                         RowState& rows) {
    Scores s;
    Weights p;
    const Skipped skipped = skipped_of<T>(means, piece.item);
    const Tiles<T> range(piece, skipped);
    Columns<T> columns;
    QueryRow mine[2];
    int tile = range.end - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[r] = query_row(piece.item, heads_per_list, at.row + 8 * r);
      const int token = min(mine[r].token, piece.item.num_tokens - 1);
      columns.visible[r] =
          piece.stream.visible + token - (tile - range.means) * T::kTokens - at.column;
    }
    if constexpr (T::kSharedQueries) {
      // The compiler learns that operands made of it are the same in all lanes.
      const int warpgroup = __shfl_sync(0xffffffffu, at.warpgroup, 0);
      uint8_t* own = smem.q + warpgroup * 64 * T::kRowBytes;
      q.shared = own;
      zero_queries<T>(own, piece.item, heads_per_list, at.warpgroup);
    }
    load_queries<T>(q, smem.q, at, mine);
    if constexpr (!T::kSharedQueries) release_queries();
    if (T::kMeans && tile < range.means) {
      ask_list(skipped, piece, tile, columns);
      first_tile<Kind::kMeans>(s, p, rows, columns);
      --tile;
    } else {
      first_tile<Kind::kCausal>(s, p, rows, columns);
      const int used =
          piece.stream.visible + piece.item.num_tokens - 1 - (tile - range.means) * T::kTokens;
      if (used < T::kTokens) {
        smem.v_full[v_ring.stage].wait(v_ring.phase);
        zero_tail<T>(smem.v[v_ring.stage], used, at.warpgroup);
      }
      // Tiles below this one are seen whole by every row.
      const int unmasked =
          max(range.means + max(piece.stream.visible, 0) / T::kTokens, range.stream_begin());
      for (--tile; tile >= unmasked; --tile) {
        columns.advance();
        step<Kind::kCausal>(s, o, p, rows, columns);
      }
      for (; tile >= range.stream_begin(); --tile) step<Kind::kWhole>(s, o, p, rows, columns);
    }
    if constexpr (T::kMeans) {
      for (; tile >= range.begin; --tile) {
        ask_list(skipped, piece, tile, columns);
        step<Kind::kMeans>(s, o, p, rows, columns);
      }
    }
    if constexpr (T::kSharedQueries) release_queries();
    last_values(o, p);
  }
};

}  // namespace compactattn::sm90
