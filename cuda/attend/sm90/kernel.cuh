// attend on sm_90a: softmax(Q K^T) V over the boxes of a list, in place in the paged pool.
//
// One producer warpgroup copies boxes into rings of K and V tiles; two consumer warpgroups of 64
// rows multiply. A tile is kTokens KV tokens of a list's stream; tiles run from the stream's end to
// its start, so that only the first few need the causal mask (visible columns of query token t:
// stream_len - tokens after t). Schedule after FlashAttention-3 (arXiv 2407.08608): Q K^T of a tile
// is issued before P V of the tile before it, and one warpgroup's products run beside the other's
// exponentials. Whether warpgroups take turns by barriers, and whether the wait for P V is held
// back behind the exponentials, was measured for each head_dim (traits.h, tests/bench/record/h100).
#pragma once

#include "../../combine/meet.cuh"
#include "../../ptx/grid.cuh"
#include "consumer.cuh"

namespace compactattn::sm90 {

struct Maps {
  // [columns / 64, tokens, heads, 64] in boxes of rows / heads_per_list tokens x heads_per_list
  // heads x 64
  const CUtensorMap& q;
  // [pages, kv heads, columns / 64, tokens of a page, 64] in copied tokens of min(box tokens,
  // kTokens) x 64
  const CUtensorMap& k;
  const CUtensorMap& v;
};

// Of kernels that correct, a parameter: the rows of means as pools whose pages are requests, in
// boxes of kTokens x 64.
struct MeanTensors {
  CUtensorMap k;
  CUtensorMap v;
};

// The same and what else they read of `means`.
struct MeanMaps {
  const CUtensorMap& k;
  const CUtensorMap& v;
  const Means& means;
};

// A pool of keys or values, that of their means, and the queries that come through the same ring.
struct Source {
  const CUtensorMap& map;
  const CUtensorMap* queries;  // may be nullptr
  const CUtensorMap* mean_map;
  const Means* means;
};

// ---- producer ----

// The one box, or half of one, of each tile that a lane copies.
template <class T>
struct BoxLane {
  int first;    // token of the tile
  int columns;  // group of 64
  int smem;     // byte of the tile
  bool copies;

  static_assert(T::kTokens / 8 * T::kGroups <= 32, "boxes of 8 tokens, one a lane");

  __device__ BoxLane(const AttendParams& params, int lane) {
    const int rows = ptx::copied_tokens(min(1 << params.log2_box_tokens, T::kTokens));
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

// One lane; the query rows of a piece, in groups of 64 columns.
template <class T>
__device__ __forceinline__ void copy_queries(const CUtensorMap& map, ptx::CopyBarrier& full,
                                             uint8_t* to, const LoadedPiece& piece, int heads) {
  full.arrive_and_expect_tx(T::kRows / heads * heads * T::kRowBytes * T::kGroups);
#pragma unroll
  for (int g = 0; g < T::kGroups; ++g) {
    const ptx::QueryBox at{piece.item.q_head, piece.item.q_token, g};
    ptx::load(map, full, to + g * T::kQGroupBytes, at);
  }
}

// One warp; K or V tiles of every piece, last tile first, behind its queries where the ring
// brings them. Every tile arrives with all its bytes, zeros included.
template <class T, int kStages>
__device__ __forceinline__ void produce_tiles(const Source& from, uint8_t (*tiles)[T::kKvTileBytes],
                                              ptx::CopyBarrier* full, ptx::Barrier* empty,
                                              const AttendParams& params) {
  const int lane = threadIdx.x % 32;
  const BoxLane<T> mine(params, lane);
  ptx::Ring<kStages> ring;
  const Pieces pieces(params.work);
  for (int i = 0; i < pieces.count; ++i) {
    const LoadedPiece piece = pieces.at(params.work, i);
    const Skipped skipped = skipped_of<T>(from.means, piece.item);
    const Tiles<T> range(piece, skipped);
    const int first = range.stream_begin();
    if (from.queries && piece.end > piece.begin) {
      empty[ring.stage].wait(ring.phase ^ 1);
      if (lane == 0)
        copy_queries<T>(*from.queries, full[ring.stage], tiles[ring.stage], piece,
                        params.work.heads_per_list);
      __syncwarp();
      ring.advance();
    }
    int token = (range.end - range.means - 1) * T::kTokens + mine.first;
    int entry = range.end > first ? entry_at(params, piece.stream, token) : 0;
#pragma unroll 1
    for (int tile = range.end - 1; tile >= first; --tile) {
      const int next = tile > first ? entry_at(params, piece.stream, token - T::kTokens) : 0;
      empty[ring.stage].wait(ring.phase ^ 1);
      if (lane == 0) full[ring.stage].arrive_and_expect_tx(T::kKvTileBytes);
      __syncwarp();
      if (mine.copies) {
        ptx::PoolBox at = place(params, entry, token);
        at.columns = mine.columns;
        at.kv_head = piece.item.kv_head;
        ptx::load(from.map, full[ring.stage], tiles[ring.stage] + mine.smem, at);
      }
      entry = next;
      token -= T::kTokens;
      ring.advance();
    }
    if constexpr (T::kMeans) {
#pragma unroll 1
      for (int tile = min(range.end, range.means) - 1; tile >= range.begin; --tile) {
        empty[ring.stage].wait(ring.phase ^ 1);
        if (lane == 0) full[ring.stage].arrive_and_expect_tx(T::kKvTileBytes);
        __syncwarp();
        if (lane < T::kGroups) {
          const ptx::PoolBox at{tile * T::kTokens, lane, piece.item.kv_head, skipped.req};
          ptx::load(*from.mean_map, full[ring.stage], tiles[ring.stage] + lane * T::kKvGroupBytes,
                    at);
        }
        ring.advance();
      }
    }
  }
}

// One thread; queries that stay in shared memory, of every piece that reads anything.
template <class T>
__device__ __forceinline__ void produce_queries(const CUtensorMap& map, SharedStorage<T>& smem,
                                                const AttendParams& params) {
  const Pieces pieces(params.work);
  uint32_t phase = 0;
  for (int i = 0; i < pieces.count; ++i) {
    const LoadedPiece piece = pieces.at(params.work, i);
    if (piece.end == piece.begin) continue;
    smem.q_empty.wait(phase ^ 1);
    copy_queries<T>(map, smem.q_full, smem.q, piece, params.work.heads_per_list);
    phase ^= 1;
  }
}

// ---- consumers ----

template <class T>
__device__ __forceinline__ void consume(const AttendParams& params, const Means* means,
                                        SharedStorage<T>& smem) {
  Consumer<T> consumer{smem, place_of_thread(), params.sm_scale * kLog2E, means, {}, {}, {}};
  const Place at = consumer.at;
  [[maybe_unused]] uint32_t q_phase = 0;
  const Pieces pieces(params.work);
  consumer.begin();
  for (int i = 0; i < pieces.count; ++i) {
    const LoadedPiece piece = pieces.at(params.work, i);
    RowState rows;
    reset(rows);
    float o[T::kOutputs] = {};
    if (piece.end > piece.begin) {
      if constexpr (T::kSharedQueries) {
        smem.q_full.wait(q_phase);
        q_phase ^= 1;
      }
      consumer.attend(piece, params.work.heads_per_list, o, rows);
    }
    finish_rows<typename T::Element, 4, T::kMeetAtOnce>(params, piece, at.row, o, rows);
  }
  consumer.end();
}

// ---- roles ----

template <class T>
__device__ __forceinline__ void init_barriers(SharedStorage<T>& smem) {
  constexpr int kReaders = T::kConsumers * 4;  // warps
  if (threadIdx.x == 0) {
    if constexpr (T::kSharedQueries) {
      smem.q_full.init(1);
      smem.q_empty.init(kReaders);
    }
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
__device__ __forceinline__ void attend(const Maps& maps, const AttendParams& params,
                                       const MeanMaps* mean = nullptr) {
  const Means* means = T::kMeans ? &mean->means : nullptr;
  extern __shared__ __align__(1024) uint8_t bytes[];
  SharedStorage<T>& smem = *reinterpret_cast<SharedStorage<T>*>(bytes);
  if (threadIdx.x == 0) smem.scale.value = params.sm_scale * kLog2E;
  // Beside the end of plan: nothing of the step is read before the wait.
  if (threadIdx.x == 0) ptx::prefetch(maps.q, maps.k, maps.v);
  init_barriers(smem);
  ptx::wait_for_earlier();
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      const Source from{maps.k, T::kSharedQueries ? nullptr : &maps.q,
                        T::kMeans ? &mean->k : nullptr, means};
      produce_tiles<T, T::kKeyStages>(from, smem.k, smem.k_full, smem.k_empty, params);
    }
    if (warp == 1) {
      const Source from{maps.v, nullptr, T::kMeans ? &mean->v : nullptr, means};
      produce_tiles<T, T::kValueStages>(from, smem.v, smem.v_full, smem.v_empty, params);
    }
    if constexpr (T::kSharedQueries) {
      if (threadIdx.x == 64) produce_queries<T>(maps.q, smem, params);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    consume<T>(params, means, smem);
  }
}

}  // namespace compactattn::sm90
