// attend by warp products: softmax(Q K^T) V over the boxes of a list, in place in the paged pool.
// Needs sm_80, and serves every later architecture, head_dim, box size and stride.
//
// All warps copy and all warps multiply (FlashAttention-2, arXiv 2307.08691): while a step of the
// stream is in work, 16-byte asynchronous copies bring the next one. Steps run from the stream's
// end to its start, so that only the first few need the causal mask (visible columns of query token
// t: stream_len - tokens after t).
#pragma once

#include "../../combine/meet.cuh"
#include "../../common/e4m3.cuh"
#include "../../common/means.cuh"
#include "../../common/softmax.cuh"
#include "../../common/work.cuh"
#include "../../ptx/grid.cuh"
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

// K or V of the pool, strides in chunks of 16 bytes: 32 bits hold them, and a product of two is one
// instruction.
struct Pool {
  const void* data;
  uint32_t page_stride;
  uint32_t token_stride;
  uint32_t head_stride;

  // Chunks before a token of a page.
  __device__ __forceinline__ uint64_t at(uint32_t page, uint32_t token, uint32_t head) const {
    return static_cast<uint64_t>(page) * page_stride + static_cast<uint64_t>(token) * token_stride +
           static_cast<uint64_t>(head) * head_stride;
  }
};

template <class T>
__device__ __forceinline__ uint32_t chunks(int64_t elements) {
  return static_cast<uint32_t>(elements / (16 / sizeof(typename T::Stored)));
}

template <class T>
__device__ __forceinline__ Pool keys(const Batch& batch) {
  return {batch.k, chunks<T>(batch.k_page_stride), chunks<T>(batch.k_token_stride),
          chunks<T>(batch.k_head_stride)};
}

template <class T>
__device__ __forceinline__ Pool values(const Batch& batch) {
  return {batch.v, chunks<T>(batch.v_page_stride), chunks<T>(batch.v_token_stride),
          chunks<T>(batch.v_head_stride)};
}

// What a thread copies of each step: one chunk of `kLaneRows` consecutive tokens.
template <class T>
struct Copier {
  const AttendParams& params;
  int list_row;
  int kv_head;
  int limit;  // tokens from here on are seen by no row and are zeros, for 0 * NaN is NaN

  __device__ __forceinline__ Copier(const AttendParams& params, const LoadedPiece& piece)
      : params(params), list_row(piece.item.list_row), kv_head(piece.item.kv_head) {
    limit = piece.stream.visible + piece.item.num_tokens - 1;
  }

  // The entry that holds `token` of the stream; -1 reads as zeros.
  __device__ __forceinline__ int entry_at(int token) const {
    if (token < 0 || token >= limit) return -1;
    const Work& work = params.work;
    return __ldg(work.boxes + static_cast<int64_t>(list_row) * work.max_boxes +
                 (token >> params.log2_box_tokens));
  }

  // That of the thread's first row.
  __device__ __forceinline__ int entry_of(int step) const {
    return entry_at(step * T::kTokens +
                    static_cast<int>(threadIdx.x) / T::kPoolRowLanes * T::kPoolLaneRows);
  }

  // `kRows` tokens from `token` on, all in the box of `entry`.
  template <int kRows>
  __device__ __forceinline__ void copy_rows(const Pool& pool, uint32_t smem, int token,
                                            int entry) const {
    const int some = max(entry, 0);
    // Pages outside the pool, of a caller's own table, read as its last.
    const int page = min(some >> params.log2_boxes_per_page, params.batch.num_pages - 1);
    const int part = some & ((1 << params.log2_boxes_per_page) - 1);
    const int within =
        (part << params.log2_box_tokens) + (token & ((1 << params.log2_box_tokens) - 1));
    const uint4* from = static_cast<const uint4*>(pool.data) + pool.at(page, within, kv_head) +
                        threadIdx.x % T::kPoolRowLanes;
    const int exist = entry < 0 ? 0 : limit - token;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ptx::copy_async(smem + r * T::kRowBytes, from, r < exist);
      from += pool.token_stride;
    }
  }

  // One step; `entry` is that of the thread's first row.
  __device__ __forceinline__ void copy(const Pool& pool, const uint8_t* tile, int step,
                                       int entry) const {
    const int thread = ptx::not_before(threadIdx.x);
    const int row = thread / T::kPoolRowLanes * T::kPoolLaneRows, chunk = thread % T::kPoolRowLanes;
    if (chunk >= T::kPoolChunks) return;
    const int token = step * T::kTokens + row;
    const uint32_t smem =
        ptx::shared_address(tile) + row * T::kRowBytes + chunk * kCopyStep<typename T::Stored>;
    if (1 << params.log2_box_tokens >= T::kPoolLaneRows) {  // the thread's rows lie in one box
      copy_rows<T::kPoolLaneRows>(pool, smem, token, entry);
    } else {
#pragma unroll 1
      for (int r = 0; r < T::kPoolLaneRows; ++r) {
        copy_rows<1>(pool, smem + r * T::kRowBytes, token + r, entry_at(token + r));
      }
    }
  }

  // What `copy` has brought, once it is there.
  __device__ __forceinline__ void widen(uint8_t* tile) const {
    const int thread = ptx::not_before(threadIdx.x);
    const int row = thread / T::kPoolRowLanes * T::kPoolLaneRows, chunk = thread % T::kPoolRowLanes;
    uint8_t* at = tile + row * T::kRowBytes + chunk * kCopyStep<typename T::Stored>;
#pragma unroll
    for (int r = 0; r < T::kPoolLaneRows; ++r)
      widen_in_place<typename T::Element>(at + r * T::kRowBytes);
  }

  // One step of means; `data` is the rows of keys or values.
  __device__ __forceinline__ void copy_means(const Means& means, const void* data,
                                             const uint8_t* tile, int step,
                                             const Skipped& skipped) const {
    const int thread = ptx::not_before(threadIdx.x);
    const int row = thread / T::kRowLanes * T::kLaneRows, chunk = thread % T::kRowLanes;
    if (chunk >= T::kChunks) return;
    const int mean = step * T::kTokens + row;
    // With one buffer, what depends on the piece alone is computed in each step: registers spill.
    const int kv_heads = T::kStages == 1 ? ptx::not_before(means.num_kv_heads) : means.num_kv_heads;
    const int64_t list = skipped.req * kv_heads + kv_head;
    const uint4* from =
        static_cast<const uint4*>(data) + (list * means.rows + mean) * T::kChunks + chunk;
    const uint32_t smem = ptx::shared_address(tile) + row * T::kRowBytes + chunk * 16;
#pragma unroll
    for (int r = 0; r < T::kLaneRows; ++r) {
      ptx::copy_async(smem + r * T::kRowBytes, from + r * T::kChunks, mean + r < skipped.means);
    }
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

// Where a thread points for each operand; rows and columns of a step are constants further.
// Computed in each step: through the loop they would cost registers that O needs.
template <class T>
struct Operands {
  uint32_t q;  // left, 16 x 16
  uint32_t k;  // right, two of 8 tokens x 16
  uint32_t v;  // right and transposed, 16 tokens x two of 8

  __device__ __forceinline__ Operands(const SharedStorage<T>& smem, int stage) {
    const int thread = ptx::not_before(threadIdx.x);
    const int lane = thread % 32, warp = thread / 32;
    const int straight = lane % 16 * T::kRowBytes + lane / 16 * 16;
    q = ptx::shared_address(smem.q) + warp * T::kWarpRows * T::kRowBytes + straight;
    k = ptx::shared_address(smem.k[stage]) + (lane / 16 * 8 + lane % 8) * T::kRowBytes +
        lane / 8 % 2 * 16;
    v = ptx::shared_address(smem.v[stage]) + straight;
  }
};

template <class T>
using Scores = float[T::kBlocks][T::kTokens / 2];

// S = Q K^T.
template <class T>
__device__ __forceinline__ void multiply_keys(Scores<T>& s, uint32_t q, uint32_t k) {
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
__device__ __forceinline__ void multiply_values(float (&o)[T::kBlocks][T::kHeadDim / 2],
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

// Columns of a step that the tile's first and last query tokens see; of a step of means, what the
// list leaves out of each.
template <class T>
struct Sight {
  int first;
  int last;
  int heads_per_list;
  int log2_block_tokens;  // of a step of means; 0: a step of tokens
  const uint2* skipped;
};

// Drops what the rows of a block may not see.
template <class T>
__device__ __forceinline__ void mask_block(float (&s)[T::kTokens / 2], const Sight<T>& sight,
                                           int block) {
  // Divisions by heads, worked out once for all pieces, cost registers that O needs.
  const int thread = T::kStages == 1 ? ptx::not_before(threadIdx.x) : threadIdx.x;
  const int row = thread / 32 * T::kWarpRows + thread % 32 / 4 + 16 * block;
  int mine[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = (row + 8 * r) / sight.heads_per_list;
    mine[r] = min(sight.first + token, sight.last) - thread % 4 * 2;
  }
  mask_scores(s, mine);
}

// Scores of one step to P, masked where rows differ in what they see; moves O where maxima rose.
template <class T>
__device__ __forceinline__ void soften(float sm_scale, const Sight<T>& sight, Scores<T>& s,
                                       Rows<T>& rows,
                                       uint32_t (&p)[T::kBlocks][T::kTokens / 16][4]) {
  const float scale = sm_scale * kLog2E;
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
    if (T::kMeans && sight.log2_block_tokens > 0) {
      // Read for each block of rows: counts kept for all of them spill.
      uint32_t skipped[T::kTokens / 16];
      load_skipped(sight.skipped, skipped);
      weigh_means(s[b], skipped, sight.log2_block_tokens, scale);
    } else if (sight.first < T::kTokens) {
      mask_block<T>(s[b], sight, b);
    }
    float top[2], factor[2];
    tile_max(s[b], top);
    if (raise_max<T>(top, scale, rows.state[b], factor)) rescale(rows.o[b], factor);
    exponentiate<true>(s[b], scale, rows.state[b]);
    pack<typename T::Element>(s[b], p[b]);
  }
}

// Steps of one piece, last first. With two buffers each, K and V of the next step arrive during the
// whole of this one. With one, V arrives during Q K^T and the exponentials, the next K from there.
template <class T>
struct Walk {
  static constexpr bool kTwo = T::kStages == 2;
  static constexpr bool kWiden = sizeof(typename T::Stored) == 1;
  const AttendParams& params;
  const Means* correction;  // of kernels that correct
  SharedStorage<T>& smem;
  Copier<T> copier;
  Skipped skipped;
  int visible;     // columns that the tile's first query token sees
  float sm_scale;  // on q . k as stored
  int& stage;      // the buffer that is read
  int first;
  int step;
  int entry;  // of the next step that is copied, asked for a step ahead

  __device__ __forceinline__ Walk(const AttendParams& params, const Means* correction,
                                  const LoadedPiece& piece, SharedStorage<T>& smem, int& stage)
      : params(params),
        correction(correction),
        smem(smem),
        copier(params, piece),
        skipped(T::kMeans ? skipped_by(*correction, piece.item) : Skipped{}),
        visible(piece.stream.visible),
        sm_scale(params.sm_scale),
        stage(stage) {
    if constexpr (kWiden) sm_scale *= key_scale(params.batch, piece.item.kv_head);
    const OwnTiles<T::kTokens, T::kMeans> own(skipped);
    first = own.at(piece.begin);
    step = min(own.at(piece.end), own.means + (copier.limit + T::kTokens - 1) / T::kTokens) - 1;
  }

  // Counted from the stream's first step; below 0 where the step is of means.
  __device__ __forceinline__ int of_stream(int of) const {
    return T::kMeans ? of - skipped.tiles(T::kTokens) : of;
  }
  __device__ __forceinline__ bool is_mean(int of) const { return T::kMeans && of_stream(of) < 0; }

  __device__ __forceinline__ void copy_keys(int buffer, int of) const {
    if (is_mean(of)) {
      copier.copy_means(*correction, correction->k, smem.k[buffer], of, skipped);
    } else {
      copier.copy(keys<T>(params.batch), smem.k[buffer], of_stream(of), entry);
    }
  }
  __device__ __forceinline__ void copy_values(int buffer, int of) const {
    if (is_mean(of)) {
      copier.copy_means(*correction, correction->v, smem.v[buffer], of, skipped);
    } else {
      copier.copy(values<T>(params.batch), smem.v[buffer], of_stream(of), entry);
    }
  }

  // Asks for the entry of a step; -1 for those of means.
  __device__ __forceinline__ void ask(int of) { entry = copier.entry_of(of_stream(of)); }

  __device__ __forceinline__ Sight<T> sight() const {
    const int column = of_stream(step) * T::kTokens;
    Sight<T> out;
    out.first = visible - column;
    out.last = copier.limit - column;
    out.heads_per_list = params.work.heads_per_list;
    out.log2_block_tokens = 0;
    if (is_mean(step)) {
      // Computed in each step, as Operands are.
      out.log2_block_tokens = ptx::not_before(correction->log2_block_tokens);
      out.skipped = skipped_at(*correction, copier.list_row, step, T::kTokens);
    }
    return out;
  }

  // Other warps may still be at the last piece's last step: `stage`, with one buffer K, is not in
  // it any more, and each warp copies its own queries.
  __device__ __forceinline__ void begin(const WorkItem& item) {
    ask(step);
    // A lane's copies may fall on query rows that the warp's other lanes still read.
    __syncwarp();
    copy_queries<T>(params, item, smem.q);
    copy_keys(stage, step);
    if constexpr (kTwo) {
      copy_values(stage, step);
      ask(step - 1);
    }
  }

  // K of the step is there for all, and V too with two buffers; what others have left is filled.
  __device__ __forceinline__ void arrive() {
    ptx::wait_copies();
    widen(smem.k[stage]);
    if constexpr (kTwo) widen(smem.v[stage]);
    __syncthreads();
    if constexpr (kTwo) {
      if (step == first) return;
      copy_keys(stage ^ 1, step - 1);
      copy_values(stage ^ 1, step - 1);
      ask(step - 2);
    } else {
      copy_values(0, step);
      ptx::commit_copies();
      ask(step - 1);
    }
  }

  // K of the step is not needed any more.
  __device__ __forceinline__ void leave_keys() const {
    if constexpr (kTwo) return;
    __syncthreads();
    if (step > first) copy_keys(0, step - 1);
    ptx::commit_copies();
  }

  __device__ __forceinline__ void await_values() const {
    if constexpr (kTwo) return;
    ptx::wait_copies_but<1>();
    widen(smem.v[0]);
    __syncthreads();
  }

  // A tile of the step, before others look at it; means come wide.
  __device__ __forceinline__ void widen(uint8_t* tile) const {
    if constexpr (kWiden) {
      if (!is_mean(step)) copier.widen(tile);
    }
  }

  __device__ __forceinline__ void run(const WorkItem& item, Rows<T>& rows) {
    begin(item);
#pragma unroll 1
    for (; step >= first; --step) {
      Scores<T> s;
      uint32_t p[T::kBlocks][T::kTokens / 16][4];
      arrive();
      const Operands<T> at(smem, stage);
      multiply_keys<T>(s, at.q, at.k);
      leave_keys();
      soften<T>(kWiden ? sm_scale : params.sm_scale, sight(), s, rows, p);
      await_values();
      multiply_values<T>(rows.o, p, Operands<T>(smem, stage).v);
      if constexpr (kTwo) stage ^= 1;
    }
  }
};

// From the units of the cache to those of its numbers.
template <class T>
__device__ __forceinline__ void scale_rows(const Batch& batch, int kv_head, Rows<T>& rows) {
  const float of_keys = key_scale(batch, kv_head), of_values = value_scale(batch, kv_head);
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
    rows.state[b].max[0] *= of_keys;
    rows.state[b].max[1] *= of_keys;
#pragma unroll
    for (int i = 0; i < T::kHeadDim / 2; ++i) rows.o[b][i] *= of_values;
  }
}

template <class T>
__device__ __forceinline__ void attend(const AttendParams& params, const Means* means = nullptr) {
  extern __shared__ __align__(16) uint8_t bytes[];
  SharedStorage<T>& smem = *reinterpret_cast<SharedStorage<T>*>(bytes);
  static_assert(sizeof(smem) == T::kSharedBytes);
  ptx::wait_for_earlier();
  int stage = 0;
  // Piece and item are read again after the walk: what holds them would cost O registers.
  for (int i = 0; i < Pieces(params.work).count; ++i) {
    Rows<T> rows = {};
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) reset(rows.state[b]);
    {
      const LoadedPiece piece = Pieces(params.work).at(params.work, i);
      if (piece.end > piece.begin) Walk<T>(params, means, piece, smem, stage).run(piece.item, rows);
    }
    const LoadedPiece piece = Pieces(params.work).at(params.work, i);
    if constexpr (sizeof(typename T::Stored) == 1) {
      scale_rows<T>(params.batch, piece.item.kv_head, rows);
    }
    const int row = threadIdx.x / 32 * T::kWarpRows + threadIdx.x % 32 / 4;
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) {
      finish_rows<typename T::Element, 2, 2>(params, piece, row + 16 * b, rows.o[b], rows.state[b]);
    }
  }
}

}  // namespace compactattn::sm80
