// attend on sm_90a: softmax(Q K^T) V over the boxes of a list, in place in the paged pool.
//
// One producer warpgroup copies boxes into rings of K and V tiles; two consumer warpgroups of 64
// rows multiply. A tile is kTokens KV tokens of a list's stream; tiles run from the stream's end to
// its start, so that only the first few need the causal mask (visible columns of query token t:
// stream_len - tokens after t). Schedule after FlashAttention-3 (arXiv 2407.08608): Q K^T of a tile
// is issued before P V of the tile before it, and one warpgroup's products run beside the other's
// exponentials. Taking turns by barriers, and holding the wait for P V back behind the
// exponentials, both cost cycles here (tests/bench/record/h100).
#pragma once

#include "../../common/epilogue.cuh"
#include "../../common/softmax.cuh"
#include "../../common/work.cuh"
#include "../../ptx/mma.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/wgmma.cuh"
#include "traits.h"

namespace compactattn::sm90 {

struct Maps {
  // [columns / 64, tokens, heads, 64] in boxes of rows / heads_per_list tokens x heads_per_list
  // heads x 64
  const CUtensorMap& q;
  // [pages, kv heads, columns / 64, tokens of a page, 64] in boxes of min(box tokens, kTokens) x 64
  const CUtensorMap& k;
  const CUtensorMap& v;
};

// Tiles of a piece, from the tile before `end` down to `begin`. Plan's tiles may be longer than
// this kernel's: of its last one those are left out that no row sees.
template <class T>
struct Tiles {
  int begin;
  int end;

  static_assert(kTileTokens % T::kTokens == 0 && kTileRows == T::kRows);

  __device__ explicit Tiles(const Piece& piece) {
    constexpr int kParts = kTileTokens / T::kTokens;
    begin = piece.begin * kParts;
    end = piece.end * kParts;
    if constexpr (kParts > 1) {
      const int seen = piece.stream.visible + piece.item.num_tokens - 1;
      end = min(end, max(seen + T::kTokens - 1, 0) / T::kTokens);
    }
  }
};

// ---- producer ----

// The one box of each tile that a lane copies.
template <class T>
struct BoxLane {
  int first;    // token of the tile
  int columns;  // group of 64
  int smem;     // byte of the tile
  bool copies;

  static_assert(T::kTokens / 8 * T::kGroups <= 32, "boxes of 8 tokens, one a lane");

  __device__ BoxLane(const AttendParams& params, int lane) {
    const int rows = min(1 << params.log2_box_tokens, T::kTokens);
    first = lane / T::kGroups * rows;
    columns = lane % T::kGroups;
    smem = columns * T::kKvGroupBytes + first * T::kRowBytes;
    copies = first < T::kTokens;
  }
};

// The entry that holds `token` of the stream; -1, which reads as zeros, past the list's end.
__device__ __forceinline__ int entry_at(const AttendParams& params, const Stream& stream,
                                        int token) {
  const int index = token >> params.log2_box_tokens;
  return index < stream.count ? __ldg(stream.boxes + index) : -1;
}

__device__ __forceinline__ ptx::PoolBox place(const AttendParams& params, int entry, int token) {
  const int part = entry & ((1 << params.log2_boxes_per_page) - 1);
  const int within = token & ((1 << params.log2_box_tokens) - 1);
  ptx::PoolBox at;
  at.page = entry < 0 ? params.batch.num_pages : entry >> params.log2_boxes_per_page;
  at.token = (part << params.log2_box_tokens) + within;
  return at;
}

// One warp; K or V tiles of every piece, last tile first. Every tile arrives with all its bytes,
// zeros included.
template <class T, int kStages>
__device__ __forceinline__ void produce_tiles(const CUtensorMap& map,
                                              uint8_t (*tiles)[T::kKvTileBytes],
                                              ptx::CopyBarrier* full, ptx::Barrier* empty,
                                              const AttendParams& params) {
  const int lane = threadIdx.x % 32;
  const BoxLane<T> mine(params, lane);
  ptx::Ring<kStages> ring;
  const Pieces pieces(params.work);
  for (int i = 0; i < pieces.count; ++i) {
    const Piece piece = pieces.at(params.work, i);
    const Tiles<T> range(piece);
    int token = (range.end - 1) * T::kTokens + mine.first;
    int entry = range.end > range.begin ? entry_at(params, piece.stream, token) : 0;
#pragma unroll 1
    for (int tile = range.end - 1; tile >= range.begin; --tile) {
      const int next = tile > range.begin ? entry_at(params, piece.stream, token - T::kTokens) : 0;
      empty[ring.stage].wait(ring.phase ^ 1);
      if (lane == 0) full[ring.stage].arrive_and_expect_tx(T::kKvTileBytes);
      __syncwarp();
      if (mine.copies) {
        ptx::PoolBox at = place(params, entry, token);
        at.columns = mine.columns;
        at.kv_head = piece.item.kv_head;
        ptx::load(map, full[ring.stage], tiles[ring.stage] + mine.smem, at);
      }
      entry = next;
      token -= T::kTokens;
      ring.advance();
    }
  }
}

// One thread; Q tiles of every piece that reads anything.
template <class T>
__device__ __forceinline__ void produce_queries(const CUtensorMap& map, SharedStorage<T>& smem,
                                                const AttendParams& params) {
  const int heads = params.work.heads_per_list;
  const int bytes = T::kRows / heads * heads * T::kRowBytes * T::kGroups;
  const Pieces pieces(params.work);
  uint32_t phase = 0;
  for (int i = 0; i < pieces.count; ++i) {
    const Piece piece = pieces.at(params.work, i);
    if (piece.end == piece.begin) continue;
    smem.q_empty.wait(phase ^ 1);
    smem.q_full.arrive_and_expect_tx(bytes);
#pragma unroll
    for (int g = 0; g < T::kGroups; ++g) {
      const ptx::QueryBox at{piece.item.q_head, piece.item.q_token, g};
      ptx::load(map, smem.q_full, smem.q + g * T::kQGroupBytes, at);
    }
    phase ^= 1;
  }
}

// ---- consumers ----

// A thread's place in its warpgroup's 64 rows; rows are query token * heads_per_list + head.
struct Place {
  int warpgroup;
  int lane;
  int row;     // of the tile; the second row is 8 below
  int column;  // of 8
};

__device__ __forceinline__ Place place_of_thread() {
  const int thread = threadIdx.x - 128;
  const int lane = thread % 32;
  return {thread / 128, lane, thread / 32 * 16 + lane / 4, lane % 4 * 2};
}

// A warpgroup's queries as left operands: those of the first steps in registers, all in shared
// memory.
template <class T>
struct Queries {
  uint32_t registers[T::kQuerySteps > 0 ? T::kQuerySteps : 1][4];
  const uint8_t* shared;  // the warpgroup's 64 rows
};

// S = Q K^T, issued.
template <class T>
__device__ __forceinline__ void issue_scores(float (&s)[T::kScores], const Queries<T>& q,
                                             const uint8_t* k) {
  using Element = typename T::Element;
  const uint64_t right = ptx::swizzled_operand(k);
  const uint64_t left = ptx::swizzled_operand(q.shared);
#pragma unroll
  for (int step = 0; step < T::kDimSteps; ++step) {
    const ptx::ScaleOut keep = step == 0 ? ptx::ScaleOut::Zero : ptx::ScaleOut::One;
    const uint64_t b = ptx::advanced(right, step / 4 * T::kKvGroupBytes + step % 4 * 32);
    if (step < T::kQuerySteps) {
      ptx::mma<Element, ptx::Major::K>(s, q.registers[step], b, keep);
    } else {
      const uint64_t a = ptx::advanced(left, step / 4 * T::kQGroupBytes + step % 4 * 32);
      ptx::mma<Element, ptx::Major::K>(s, a, b, keep);
    }
  }
  cute::warpgroup_commit_batch();
}

// The warp's 16 query rows as left operands. Rows that are not the item's become zeros: they hold
// other lists' queries or nothing, and a row maximum may move when its warp's other rows are
// rescaled, and so their last bits.
template <class T>
__device__ __forceinline__ void load_queries(Queries<T>& q, const uint8_t* tile, const Place& at,
                                             const QueryRow (&mine)[2]) {
  const int row = at.lane % 16;
  const uint8_t* rows = tile + (at.row - at.lane / 4 + row) * T::kRowBytes;
#pragma unroll
  for (int step = 0; step < T::kQuerySteps; ++step) {
    const int chunk = step % 4 * 2 + at.lane / 16;
    ptx::load_matrices(q.registers[step],
                       rows + step / 4 * T::kQGroupBytes + (chunk ^ row % 8) * 16);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (!mine[w % 2].used) q.registers[step][w] = 0;
    }
  }
}

// The same zeros, for products that read the warpgroup's queries from shared memory.
template <class T>
__device__ __forceinline__ void zero_queries(uint8_t* q, const WorkItem& item, int heads_per_list,
                                             int warpgroup) {
  constexpr int kChunks = T::kRowBytes / 16;
  const bool whole =
      item.num_heads == heads_per_list && item.num_tokens * heads_per_list == T::kRows;
  if (whole) return;
  for (int i = threadIdx.x % 128; i < 64 * kChunks; i += 128) {
    const int row = i / kChunks;
    if (query_row(item, heads_per_list, warpgroup * 64 + row).used) continue;
#pragma unroll
    for (int g = 0; g < T::kGroups; ++g)
      reinterpret_cast<uint4*>(q + g * T::kQGroupBytes)[i] = uint4{};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, warpgroup);
}

// O += P V, issued.
template <class T>
__device__ __forceinline__ void issue_values(float (&o)[T::kOutputs],
                                             const uint32_t (&p)[T::kTokenSteps][4],
                                             const uint8_t* v) {
  const uint64_t right = ptx::swizzled_operand(v, T::kKvGroupBytes);
#pragma unroll
  for (int step = 0; step < T::kTokenSteps; ++step) {
    ptx::mma<typename T::Element, ptx::Major::MN>(
        o, p[step], ptx::advanced(right, step * 16 * T::kRowBytes), ptx::ScaleOut::One);
  }
  cute::warpgroup_commit_batch();
}

// One lane a warp tells the producer that the warp has read the buffer.
__device__ __forceinline__ void release(ptx::Barrier& empty, int lane) {
  if (lane == 0) empty.arrive();
}

// V rows past the tile's last visible token may hold anything, and 0 * NaN is NaN. Both warpgroups
// write the same zeros.
template <class T>
__device__ __forceinline__ void zero_tail(uint8_t* v, int used, int warpgroup) {
  constexpr int kChunks = T::kRowBytes / 16;
  const int chunks = (T::kTokens - used) * kChunks;
  for (int i = threadIdx.x % 128; i < chunks * T::kGroups; i += 128) {
    const int group = i / chunks;
    reinterpret_cast<uint4*>(v + group * T::kKvGroupBytes +
                             used * T::kRowBytes)[i - group * chunks] = uint4{};
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, warpgroup);
}

template <class T>
struct Consumer {
  using Scores = float[T::kScores];
  using Outputs = float[T::kOutputs];
  using Weights = uint32_t[T::kTokenSteps][4];

  SharedStorage<T>& smem;
  Place at;
  float scale;  // sm_scale * log2(e)
  ptx::Ring<T::kKeyStages> k_ring;
  ptx::Ring<T::kValueStages> v_ring;
  Queries<T> q;

  // The piece's first tile: scores and P; nothing to overlap with yet.
  __device__ __forceinline__ void first_tile(Scores& s, Weights& p, RowState& rows,
                                             const int (&visible)[2]) {
    smem.k_full[k_ring.stage].wait(k_ring.phase);
    ptx::fence_registers(s);
    cute::warpgroup_arrive();
    issue_scores<T>(s, q, smem.k[k_ring.stage]);
    cute::warpgroup_wait<0>();
    ptx::fence_registers(s);
    release(smem.k_empty[k_ring.stage], at.lane);
    k_ring.advance();
    mask_scores(s, visible);
    float top[2], factor[2];
    tile_max(s, top);
    raise_max<T>(top, scale, rows, factor);
    exponentiate<true>(s, scale, rows);
    pack<typename T::Element>(s, p);
  }

  // Scores of the next tile beside O += P V of the last one.
  template <bool kMasked>
  __device__ __forceinline__ void step(Scores& s, Outputs& o, Weights& p, RowState& rows,
                                       const int (&visible)[2]) {
    // Both waits stand before the products: a branch between them costs a second fence. V was asked
    // for long before K.
    smem.v_full[v_ring.stage].wait(v_ring.phase);
    smem.k_full[k_ring.stage].wait(k_ring.phase);
    ptx::fence_registers(s);
    ptx::fence_registers(o);
    cute::warpgroup_arrive();
    issue_scores<T>(s, q, smem.k[k_ring.stage]);
    issue_values<T>(o, p, smem.v[v_ring.stage]);
    cute::warpgroup_wait<1>();
    ptx::fence_registers(s);
    release(smem.k_empty[k_ring.stage], at.lane);
    k_ring.advance();
    if constexpr (kMasked) mask_scores(s, visible);
    float top[2], factor[2];
    tile_max(s, top);
    const bool grown = raise_max<T>(top, scale, rows, factor);
    exponentiate<kMasked, T::kPolyEvery>(s, scale, rows);
    if constexpr (T::kHeldWait) {
      const unsigned mask = __ballot_sync(0xffffffffu, !(rows.sum[0] + rows.sum[1] < 0.0f));
      asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
    }
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
    cute::warpgroup_wait<0>();
    ptx::fence_registers(o);
    release(smem.v_empty[v_ring.stage], at.lane);
    v_ring.advance();
  }

  // O and row sums of one piece.
  __device__ __forceinline__ void attend(const Piece& piece, int heads_per_list, Outputs& o,
                                         RowState& rows) {
    Scores s;
    Weights p;
    const Tiles<T> range(piece);
    int visible[2];  // columns from the thread's first column of the current tile
    QueryRow mine[2];
    int tile = range.end - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mine[r] = query_row(piece.item, heads_per_list, at.row + 8 * r);
      const int token = min(mine[r].token, piece.item.num_tokens - 1);
      visible[r] = piece.stream.visible + token - tile * T::kTokens - at.column;
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
    first_tile(s, p, rows, visible);
    const int used = piece.stream.visible + piece.item.num_tokens - 1 - tile * T::kTokens;
    if (used < T::kTokens) {
      smem.v_full[v_ring.stage].wait(v_ring.phase);
      zero_tail<T>(smem.v[v_ring.stage], used, at.warpgroup);
    }
    // Tiles below this one are seen whole by every row.
    const int unmasked = max(max(piece.stream.visible, 0) / T::kTokens, range.begin);
    for (--tile; tile >= unmasked; --tile) {
      visible[0] += T::kTokens;
      visible[1] += T::kTokens;
      step<true>(s, o, p, rows, visible);
    }
    for (; tile >= range.begin; --tile) step<false>(s, o, p, rows, visible);
    if constexpr (T::kSharedQueries) release_queries();
    last_values(o, p);
  }
};

template <class T>
__device__ __forceinline__ void consume(const AttendParams& params, SharedStorage<T>& smem) {
  Consumer<T> consumer{smem, place_of_thread(), params.sm_scale * kLog2E, {}, {}, {}};
  const Place at = consumer.at;
  uint32_t q_phase = 0;
  const Pieces pieces(params.work);
  for (int i = 0; i < pieces.count; ++i) {
    const Piece piece = pieces.at(params.work, i);
    RowState rows;
    reset(rows);
    float o[T::kOutputs] = {};
    if (piece.end > piece.begin) {
      smem.q_full.wait(q_phase);
      q_phase ^= 1;
      consumer.attend(piece, params.work.heads_per_list, o, rows);
    }
    if (piece.slot < 0) {
      store_rows<typename T::Element>(params, piece.item, at.row, o, rows);
    } else {
      store_partial(params, piece.slot, at.row, o, rows);
    }
  }
}

// ---- roles ----

template <class T>
__device__ __forceinline__ void init_barriers(SharedStorage<T>& smem) {
  constexpr int kReaders = T::kConsumers * 4;  // warps
  if (threadIdx.x == 0) {
    smem.q_full.init(1);
    smem.q_empty.init(kReaders);
    for (int i = 0; i < T::kKeyStages; ++i) {
      smem.k_full[i].init(1);
      smem.k_empty[i].init(kReaders);
    }
    for (int i = 0; i < T::kValueStages; ++i) {
      smem.v_full[i].init(1);
      smem.v_empty[i].init(kReaders);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void attend(const Maps& maps, const AttendParams& params) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  SharedStorage<T>& smem = *reinterpret_cast<SharedStorage<T>*>(bytes);
  init_barriers(smem);
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0)
      produce_tiles<T, T::kKeyStages>(maps.k, smem.k, smem.k_full, smem.k_empty, params);
    if (warp == 1)
      produce_tiles<T, T::kValueStages>(maps.v, smem.v, smem.v_full, smem.v_empty, params);
    if (threadIdx.x == 64) produce_queries<T>(maps.q, smem, params);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    consume<T>(params, smem);
  }
}

}  // namespace compactattn::sm90
