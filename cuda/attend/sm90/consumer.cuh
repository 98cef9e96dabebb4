// A consumer warpgroup that takes the stream tile by tile: Q K^T of a tile beside P V of the one
// before it.
#pragma once

#include "../../common/softmax.cuh"
#include "ahead.cuh"
#include "products.cuh"

namespace compactattn::sm90 {

template <class T>
struct Consumer {
  using Scores = float[T::kScores];
  using Outputs = float[T::kOutputs];
  using Weights = uint32_t[T::kTokenSteps][4];
  static constexpr int kTurnBarrier = 2;  // after those of products.cuh

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
    release_keys();
    float factor[2];
    raise_for<T, kKind>(s, scale, rows, columns, factor);
    exponentiate<true>(s, scale, rows);
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
    if constexpr (T::kTurns) begin_turn();
    ptx::fence_registers(s);
    ptx::fence_registers(o);
    cute::warpgroup_arrive();
    issue_scores(s, q, smem.k[k_ring.stage]);
    cute::warpgroup_commit_batch();
    issue_values<T>(o, p, smem.v[v_ring.stage]);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    ptx::fence_registers(s);
    if constexpr (T::kTurns) end_turn();
    if constexpr (T::kAhead && kKind != Kind::kCausal) {
      weigh_ahead<kKind>(s, o, rows, columns);
    } else {
      weigh<kKind>(s, o, rows, columns);
    }
    pack<typename T::Element>(s, p);
  }

  // P of a tile on its own maxima, and O on them too once its products are done.
  template <Kind kKind>
  __device__ __forceinline__ void weigh(Scores& s, Outputs& o, RowState& rows,
                                        const Columns<T>& columns) {
    release_keys();
    float factor[2];
    const bool grown = raise_for<T, kKind>(s, scale, rows, columns, factor);
    exponentiate<kKind != Kind::kWhole>(s, scale, rows);
    cute::warpgroup_wait<0>();
    ptx::fence_registers(o);
    release_values();
    if (grown) rescale(o, factor);
  }

  // The same on maxima of tiles before, which are still good nearly always. Keys stay: where P has
  // overflowed, its scores are made again.
  template <Kind kKind>
  __device__ __forceinline__ void weigh_ahead(Scores& s, Outputs& o, RowState& rows,
                                              const Columns<T>& columns) {
    float sums[2];
    const float scale_now = T::kTurns ? smem.scale.after_barriers() : scale;
    adjust<T, kKind>(s, scale_now, columns);
    const bool above = exponentiate_ahead<T>(s, scale_now, rows, sums);
    if constexpr (T::kHeldWait) ptx::wait_no_earlier(sums[0] + sums[1]);
    cute::warpgroup_wait<0>();
    ptx::fence_registers(o);
    if (above) catch_up<kKind>(s, o, rows, sums, columns);
    rows.sum[0] += sums[0];
    rows.sum[1] += sums[1];
    release_keys();
    release_values();
  }

  // Raises the maxima under P of a tile.
  template <Kind kKind>
  __device__ __forceinline__ void catch_up(Scores& s, Outputs& o, RowState& rows, float (&sums)[2],
                                           const Columns<T>& columns) {
    float factor[2];
    if (!__any_sync(0xffffffffu, !(sums[0] + sums[1] <= kMostMoved))) {
      move_up(s, scale, rows, sums, factor);
      rescale(o, factor);
      return;
    }
    scores_again<T>(s, q, smem.k[k_ring.stage], at.lane);
    if (raise_for<T, kKind>(s, scale, rows, columns, factor)) rescale(o, factor);
    exponentiate<true>(s, scale, rows);
    sums[0] = sums[1] = 0.0f;
  }

  // One warpgroup at a time issues products, and the other only when those of scores are done: side
  // by side both would end late and both exponentiate at once.
  __device__ __forceinline__ void begin_turn() {
    cutlass::arch::NamedBarrier::sync(2 * 128, kTurnBarrier + at.warpgroup);
  }

  __device__ __forceinline__ void end_turn() {
    cutlass::arch::NamedBarrier::arrive(2 * 128, kTurnBarrier + 1 - at.warpgroup);
  }

  // Around all pieces; both warpgroups take equally many turns, the first warpgroup first. With a
  // barrier that is no constant in a branch the assembler holds that warps part there, and keeps
  // operands of all products in registers of each lane: 9 % slower.
  __device__ __forceinline__ void begin() {
    if (T::kTurns && at.warpgroup == 1) cutlass::arch::NamedBarrier::arrive(2 * 128, kTurnBarrier);
  }

  __device__ __forceinline__ void end() {
    if (T::kTurns && at.warpgroup == 0) cutlass::arch::NamedBarrier::sync(2 * 128, kTurnBarrier);
  }

  __device__ __forceinline__ void release_keys() {
    release(smem.k_empty[k_ring.stage], at.lane);
    k_ring.advance();
  }

  __device__ __forceinline__ void release_values() {
    release(smem.v_empty[v_ring.stage], at.lane);
    v_ring.advance();
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
    release_values();
  }

  // What a tile of means needs of the list.
  __device__ __forceinline__ void ask_list(const LoadedPiece& piece, int tile,
                                           Columns<T>& columns) const {
    load_skipped(skipped_at(*means, piece.item.list_row, tile, T::kTokens), columns.skipped);
    columns.log2_block_tokens = means->log2_block_tokens;
  }

  // Queries to registers, and who reads them from shared memory where they are.
  __device__ __forceinline__ void take_queries(const WorkItem& item, int heads_per_list,
                                               const QueryRow (&mine)[2]) {
    if constexpr (T::kSharedQueries) {
      // The compiler learns that operands made of it are the same in all lanes.
      const int warpgroup = __shfl_sync(0xffffffffu, at.warpgroup, 0);
      uint8_t* own = smem.q + warpgroup * 64 * T::kRowBytes;
      q.shared = own;
      zero_queries<T>(own, item, heads_per_list, at.warpgroup);
      load_queries<T>(q, smem.q, at, mine);
    } else {
      smem.k_full[k_ring.stage].wait(k_ring.phase);
      load_queries<T>(q, smem.k[k_ring.stage], at, mine);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      release_keys();
    }
  }

  // O and row sums of one piece.
  __device__ __forceinline__ void attend(const LoadedPiece& piece, int heads_per_list, Outputs& o,
                                         RowState& rows) {
    Scores s;
    Weights p;
    const Tiles<T> range(piece, skipped_of<T>(means, piece.item));
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
    take_queries(piece.item, heads_per_list, mine);
    if (T::kMeans && tile < range.means) {
      ask_list(piece, tile, columns);
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
      // Tiles below this one are seen whole by every row, and every row has seen something of
      // others.
      const int unmasked =
          max(range.means + (max(piece.stream.visible, 1) - 1) / T::kTokens, range.stream_begin());
      for (--tile; tile >= unmasked; --tile) {
        columns.advance();
        step<Kind::kCausal>(s, o, p, rows, columns);
      }
      for (; tile >= range.stream_begin(); --tile) step<Kind::kWhole>(s, o, p, rows, columns);
    }
    if constexpr (T::kMeans) {
      for (; tile >= range.begin; --tile) {
        ask_list(piece, tile, columns);
        step<Kind::kMeans>(s, o, p, rows, columns);
      }
    }
    if constexpr (T::kSharedQueries) release_queries();
    last_values(o, p);
  }
};

}  // namespace compactattn::sm90
