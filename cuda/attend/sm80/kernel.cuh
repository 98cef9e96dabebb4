// attend by warp products: softmax(Q K^T) V over the boxes of a list, in place in the paged pool.
// Needs sm_80, and serves every later architecture, head_dim, box size and stride.
//
// All warps copy and all warps multiply (FlashAttention-2, arXiv 2307.08691): while a step of the
// stream is in work, 16-byte asynchronous copies bring the next one. Steps run from the stream's
// end to its start, so that only the first few need the causal mask (visible columns of query token
// t: stream_len - tokens after t).
#pragma once

#include "../../common/epilogue.cuh"
#include "../../common/softmax.cuh"
#include "../../common/work.cuh"
#include "../../ptx/mma.cuh"
#include "traits.h"

namespace compactattn::sm80 {

template <class T>
struct SharedStorage {
  alignas(16) uint8_t q[T::kRows * T::kRowBytes];
  alignas(16) uint8_t k[T::kStages][T::kKvTileBytes];
  alignas(16) uint8_t v[T::kStages][T::kKvTileBytes];
};

// ---- copies ----

// What a thread copies of each step: one chunk of `kLaneRows` consecutive tokens.
template <class T>
struct Copier {
  const AttendParams& params;
  Stream stream;
  int limit;  // tokens from here on are seen by no row and are zeros, for 0 * NaN is NaN
  int row;    // of the step, the thread's first
  bool copies;
  bool one_box;  // the thread's rows of a step lie in one box
  int entry;     // of the next step's first row, asked for a step ahead; -1 reads as zeros
  int kv_head;

  __device__ __forceinline__ Copier(const AttendParams& params, const Piece& piece)
      : params(params), stream(piece.stream) {
    limit = stream.visible + piece.item.num_tokens - 1;
    row = threadIdx.x / T::kRowLanes * T::kLaneRows;
    copies = threadIdx.x % T::kRowLanes < T::kChunks;
    one_box = 1 << params.log2_box_tokens >= T::kLaneRows;
    kv_head = piece.item.kv_head;
  }

  // The entry that holds `token` of the stream.
  __device__ __forceinline__ int entry_at(int token) const {
    return token >= 0 && token < limit ? __ldg(stream.boxes + (token >> params.log2_box_tokens))
                                       : -1;
  }

  __device__ __forceinline__ void prefetch(int step) { entry = entry_at(step * T::kTokens + row); }

  // `rows` tokens from `token` on, all in the box of `entry`.
  template <int kRows>
  __device__ __forceinline__ void copy_rows(uint32_t k_smem, uint32_t v_smem, int token,
                                            int entry) const {
    const Batch& batch = params.batch;
    const int some = max(entry, 0);
    const int64_t page = some >> params.log2_boxes_per_page;
    const int part = some & ((1 << params.log2_boxes_per_page) - 1);
    const int64_t within =
        (part << params.log2_box_tokens) + (token & ((1 << params.log2_box_tokens) - 1));
    const int64_t chunk = threadIdx.x % T::kRowLanes * 8;
    const uint8_t* from_k = static_cast<const uint8_t*>(batch.k) +
                            2 * (page * batch.k_page_stride + within * batch.k_token_stride +
                                 kv_head * batch.k_head_stride + chunk);
    const uint8_t* from_v = static_cast<const uint8_t*>(batch.v) +
                            2 * (page * batch.v_page_stride + within * batch.v_token_stride +
                                 kv_head * batch.v_head_stride + chunk);
    const int exist = entry < 0 ? 0 : limit - token;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ptx::copy_async(k_smem + r * T::kRowBytes, from_k, r < exist);
      from_k += 2 * batch.k_token_stride;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ptx::copy_async(v_smem + r * T::kRowBytes, from_v, r < exist);
      from_v += 2 * batch.v_token_stride;
    }
  }

  // K and V of one step, and the entry of the step before it in the stream.
  __device__ __forceinline__ void copy(const uint8_t* k_tile, const uint8_t* v_tile, int step) {
    const int token = step * T::kTokens + row;
    const int at = row * T::kRowBytes + threadIdx.x % T::kRowLanes * 16;
    const uint32_t k_smem = ptx::shared_address(k_tile) + at;
    const uint32_t v_smem = ptx::shared_address(v_tile) + at;
    if (!copies) return;
    if (one_box) {
      copy_rows<T::kLaneRows>(k_smem, v_smem, token, entry);
    } else {
#pragma unroll 1
      for (int r = 0; r < T::kLaneRows; ++r) {
        const int to = r * T::kRowBytes;
        copy_rows<1>(k_smem + to, v_smem + to, token + r, entry_at(token + r));
      }
    }
    prefetch(step - 1);
  }
};

// The warp's rows of the item's queries; zeros for rows that are not the item's, whose maxima may
// otherwise move when the warp's other rows are rescaled, and so their last bits.
template <class T>
__device__ __forceinline__ void copy_queries(const AttendParams& params, const WorkItem& item,
                                             uint8_t* q) {
  const Batch& batch = params.batch;
  const int first = threadIdx.x / 32 * T::kWarpRows;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < T::kWarpRows * T::kChunks; i += 32) {
    const int row = first + i / T::kChunks, chunk = i % T::kChunks;
    const QueryRow mine = query_row(item, params.work.heads_per_list, row);
    const int64_t token = item.q_token + (mine.used ? mine.token : 0);
    const int64_t head = item.q_head + (mine.used ? mine.head : 0);
    const uint8_t* from = static_cast<const uint8_t*>(batch.q) + 16 * chunk +
                          2 * (token * batch.q_token_stride + head * batch.q_head_stride);
    ptx::copy_async(ptx::shared_address(q) + row * T::kRowBytes + chunk * 16, from, mine.used);
  }
}

// ---- products ----

// Where a thread's lane points for each operand; rows and columns of a step are constants further.
template <class T>
struct Operands {
  uint32_t q;  // left, 16 x 16
  uint32_t k;  // right, two of 8 tokens x 16
  uint32_t v;  // right and transposed, 16 tokens x two of 8

  __device__ __forceinline__ explicit Operands(const SharedStorage<T>& smem) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int straight = lane % 16 * T::kRowBytes + lane / 16 * 16;
    q = ptx::shared_address(smem.q) + warp * T::kWarpRows * T::kRowBytes + straight;
    k = ptx::shared_address(smem.k) + (lane / 16 * 8 + lane % 8) * T::kRowBytes + lane / 8 % 2 * 16;
    v = ptx::shared_address(smem.v) + straight;
  }
};

// S = Q K^T.
template <class T>
__device__ __forceinline__ void scores(float (&s)[T::kBlocks][T::kTokens / 2], uint32_t q,
                                       uint32_t k) {
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) s[b][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < T::kHeadDim / 16; ++step) {
    uint32_t left[T::kBlocks][4];
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b)
      ptx::load_matrices(left[b], q + b * 16 * T::kRowBytes + step * 32);
#pragma unroll
    for (int n = 0; n < T::kTokens / 16; ++n) {
      uint32_t right[4];
      ptx::load_matrices(right, k + n * 16 * T::kRowBytes + step * 32);
#pragma unroll
      for (int b = 0; b < T::kBlocks; ++b) {
        ptx::mma<typename T::Element>(&s[b][8 * n], left[b], right[0], right[1]);
        ptx::mma<typename T::Element>(&s[b][8 * n + 4], left[b], right[2], right[3]);
      }
    }
  }
}

// O += P V.
template <class T>
__device__ __forceinline__ void values(float (&o)[T::kBlocks][T::kHeadDim / 2],
                                       const uint32_t (&p)[T::kBlocks][T::kTokens / 16][4],
                                       uint32_t v) {
#pragma unroll
  for (int step = 0; step < T::kTokens / 16; ++step) {
#pragma unroll
    for (int n = 0; n < T::kHeadDim / 16; ++n) {
      uint32_t right[4];
      ptx::load_transposed(right, v + step * 16 * T::kRowBytes + n * 32);
#pragma unroll
      for (int b = 0; b < T::kBlocks; ++b) {
        ptx::mma<typename T::Element>(&o[b][8 * n], p[b][step], right[0], right[1]);
        ptx::mma<typename T::Element>(&o[b][8 * n + 4], p[b][step], right[2], right[3]);
      }
    }
  }
}

// ---- one piece ----

template <class T>
struct Rows {
  float o[T::kBlocks][T::kHeadDim / 2];
  RowState state[T::kBlocks];
};

// Scores of one block of 16 rows to P; moves O where the maxima rose.
template <class T>
__device__ __forceinline__ void soften(float (&s)[T::kTokens / 2], float scale, RowState& state,
                                       float (&o)[T::kHeadDim / 2],
                                       uint32_t (&p)[T::kTokens / 16][4]) {
  float top[2], factor[2];
  tile_max(s, top);
  if (raise_max<T>(top, scale, state, factor)) rescale(o, factor);
  exponentiate<true>(s, scale, state);
  pack<typename T::Element>(s, p);
}

// Drops what the rows of a block may not see of the step at `column`.
template <class T>
__device__ __forceinline__ void mask_block(float (&s)[T::kTokens / 2], const Piece& piece,
                                           int heads_per_list, int row, int column) {
  int visible[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const QueryRow mine = query_row(piece.item, heads_per_list, row + 8 * r);
    const int token = min(mine.token, piece.item.num_tokens - 1);
    visible[r] = piece.stream.visible + token - column - static_cast<int>(threadIdx.x % 4 * 2);
  }
  mask_scores(s, visible);
}

// `stage` is the buffer to fill next; all threads have left it.
template <class T>
__device__ __forceinline__ void attend_piece(const AttendParams& params, const Piece& piece,
                                             SharedStorage<T>& smem, int& stage, Rows<T>& rows) {
  constexpr int kSteps = kTileTokens / T::kTokens;  // a tile
  const float scale = params.sm_scale * kLog2E;
  const int row = threadIdx.x / 32 * T::kWarpRows + threadIdx.x % 32 / 4;
  const Operands<T> at(smem);
  Copier<T> copier(params, piece);
  const int first = piece.begin * kSteps;
  int step = min(piece.end * kSteps, (copier.limit + T::kTokens - 1) / T::kTokens) - 1;
  copier.prefetch(step);
  copy_queries<T>(params, piece.item, smem.q);
  copier.copy(smem.k[stage], smem.v[stage], step);
#pragma unroll 1
  for (; step >= first; --step) {
    const uint32_t tile = stage * T::kKvTileBytes;
    stage ^= 1;
    ptx::wait_copies();
    __syncthreads();
    if (step > first) copier.copy(smem.k[stage], smem.v[stage], step - 1);
    float s[T::kBlocks][T::kTokens / 2];
    uint32_t p[T::kBlocks][T::kTokens / 16][4];
    scores<T>(s, at.q, at.k + tile);
    const int column = step * T::kTokens;
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) {
      if (column + T::kTokens > piece.stream.visible) {
        mask_block<T>(s[b], piece, params.work.heads_per_list, row + 16 * b, column);
      }
      soften<T>(s[b], scale, rows.state[b], rows.o[b], p[b]);
    }
    values<T>(rows.o, p, at.v + tile);
  }
}

template <class T>
__device__ __forceinline__ void attend(const AttendParams& params) {
  extern __shared__ __align__(16) uint8_t bytes[];
  SharedStorage<T>& smem = *reinterpret_cast<SharedStorage<T>*>(bytes);
  static_assert(sizeof(smem) == T::kSharedBytes);
  const int row = threadIdx.x / 32 * T::kWarpRows + threadIdx.x % 32 / 4;
  const Pieces pieces(params.work);
  int stage = 0;
  for (int i = 0; i < pieces.count; ++i) {
    const Piece piece = pieces.at(params.work, i);
    Rows<T> rows = {};
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) reset(rows.state[b]);
    if (piece.end > piece.begin) attend_piece<T>(params, piece, smem, stage, rows);
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) {
      if (piece.slot < 0) {
        store_rows<typename T::Element>(params, piece.item, row + 16 * b, rows.o[b], rows.state[b]);
      } else {
        store_partial(params, piece.slot, row + 16 * b, rows.o[b], rows.state[b]);
      }
    }
  }
}

}  // namespace compactattn::sm80
