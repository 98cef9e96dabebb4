// What consumer warpgroups do to a tile: matrix products, operands, buffers given back.
#pragma once

#include "../../common/means.cuh"
#include "../../common/softmax.cuh"
#include "../../ptx/mma.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/wgmma.cuh"
#include "traits.h"

namespace compactattn::sm90 {

// Tiles of a piece, from the tile before `end` down to `begin`. Plan's tiles may be longer than
// this kernel's: of its last one those are left out that no row sees.
template <class T>
struct Tiles {
  int begin;
  int end;
  int means;  // tiles before the stream's

  static_assert(kTileRows == T::kRows);

  __device__ Tiles(const LoadedPiece& piece, const Skipped& skipped) {
    const OwnTiles<T::kTokens, T::kMeans> own(skipped);
    means = own.means;
    begin = own.at(piece.begin);
    end = own.at(piece.end);
    if constexpr (own.kParts > 1) {
      const int seen = piece.stream.visible + piece.item.num_tokens - 1;
      end = min(end, means + max(seen + T::kTokens - 1, 0) / T::kTokens);
    }
  }

  // The first tile of the piece that is of the stream.
  __device__ int stream_begin() const { return T::kMeans ? max(begin, means) : begin; }
};

// What the piece's list leaves out; nothing in kernels that do not correct.
template <class T>
__device__ __forceinline__ Skipped skipped_of(const Means* means, const WorkItem& item) {
  if constexpr (T::kMeans) return skipped_by(*means, item);
  return {};
}

// What differs between the tiles of a piece.
enum class Kind {
  kWhole,   // every row sees every column
  kCausal,  // rows differ in what they see
  kMeans,
};

// A thread's part of a tile, as far as the tile's kind asks for it.
template <class T>
struct Columns {
  int visible[2];                     // of each row, from the thread's first column
  uint32_t skipped[T::kTokens / 16];  // means: counts as they are, so that nothing waits for them
  int log2_block_tokens;

  // The next tile of the stream is taken.
  __device__ __forceinline__ void advance() {
    visible[0] += T::kTokens;
    visible[1] += T::kTokens;
  }
};

// Scores of a tile as what each column is makes them: beyond the causal mask, or of means.
template <class T, Kind kKind>
__device__ __forceinline__ void adjust(float (&s)[T::kScores], float scale,
                                       const Columns<T>& columns) {
  if constexpr (kKind == Kind::kCausal) mask_scores(s, columns.visible);
  if constexpr (kKind == Kind::kMeans)
    weigh_means(s, columns.skipped, columns.log2_block_tokens, scale);
}

// Raises the reference maxima where the tile asks for it; whether O must be multiplied by `factor`.
template <class T, Kind kKind>
__device__ __forceinline__ bool raise_for(float (&s)[T::kScores], float scale, RowState& rows,
                                          const Columns<T>& columns, float (&factor)[2]) {
  adjust<T, kKind>(s, scale, columns);
  float top[2];
  tile_max(s, top);
  return raise_max<T>(top, scale, rows, factor);
}

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

// S = Q K^T over 2 N tokens from `k` on, issued.
template <class T, int N>
__device__ __forceinline__ void issue_scores(float (&s)[N], const Queries<T>& q, const uint8_t* k) {
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

// O += P V over the tokens of `p` from `v` on, issued.
template <class T, int kSteps>
__device__ __forceinline__ void issue_values(float (&o)[T::kOutputs],
                                             const uint32_t (&p)[kSteps][4], const uint8_t* v) {
  const uint64_t right = ptx::swizzled_operand(v, T::kKvGroupBytes);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::mma<typename T::Element, ptx::Major::MN>(
        o, p[step], ptx::advanced(right, step * 16 * T::kRowBytes), ptx::ScaleOut::One);
  }
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

}  // namespace compactattn::sm90
