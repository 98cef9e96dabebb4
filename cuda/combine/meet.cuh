// combine: the pieces of a cut item meet two by two in a fixed tree, warp by warp: whichever of the
// two comes second adds the other's rows to its own, and goes on. Nobody waits. Sums do not depend
// on who came second, so every run gives the same bits: a softmax is put together from its parts in
// any order (online normaliser, arXiv 1805.02867), and both addends are rounded before they are
// added.
#pragma once

#include "../common/epilogue.cuh"
#include "../ptx/grid.cuh"

namespace compactattn {

constexpr int kWarpRows = 16;  // that a warp's accumulators hold
static_assert(kTileRows == kWarpRows * kArrivals, "who has arrived is counted by 16 rows");

// A warp's 16 rows of an item's parts from `first` on, divided by their sums.
struct Meeting {
  const AttendParams& params;
  int first_cta;  // of the item
  int parts;
  int first;
  int row;     // the thread's first row of the tile
  int thread;  // of the CTA

  __device__ __forceinline__ Meeting(const AttendParams& params, const LoadedPiece& piece, int row)
      : params(params),
        first_cta(static_cast<int>(blockIdx.x) - piece.part),
        parts(piece.parts),
        first(piece.part),
        row(row),
        thread(ptx::not_before(threadIdx.x)) {}

  // Where parts from `part` on lie: each CTA has a slot for the part that it begins an item with
  // and one for what it goes on with.
  __device__ __forceinline__ int64_t slot(int part) const {
    return 2 * (first_cta + part) + (part == 0);
  }

  // In the order of a thread's accumulators: whoever reads them holds the same rows and columns.
  template <int N>
  __device__ __forceinline__ float4* out(int part) const {
    const int64_t at = slot(part) * kArrivals + row / kWarpRows;
    return reinterpret_cast<float4*>(params.results.partial_out) + at * (32 * N / 4) + thread % 32;
  }

  __device__ __forceinline__ float* lse(int part) const {
    return params.results.partial_lse + slot(part) * kTileRows + row;
  }

  template <int N>
  __device__ __forceinline__ void leave(const float (&o)[N], const RowEnd (&ends)[2]) const {
    float4* to = out<N>(first);
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
      to[32 * i] = {o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
    if (thread % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) lse(first)[8 * r] = ends[r].lse;
    }
  }

  // Whether the parts from `other` on are there. If not, ours are left for who brings them.
  template <int N>
  __device__ __forceinline__ bool is_second(int other, const float (&o)[N],
                                            const RowEnd (&ends)[2]) const {
    int32_t* arrival =
        params.work.arrivals + (first_cta + max(first, other)) * kArrivals + row / kWarpRows;
    const int lane = thread % 32;
    int arrived = lane == 0 ? *static_cast<volatile int32_t*>(arrival) : 0;
    arrived = __shfl_sync(0xffffffffu, arrived, 0);
    if (!arrived) {
      leave(o, ends);
      ptx::fence_device();
      __syncwarp();
      if (lane == 0) arrived = atomicAdd(arrival, 1);
      arrived = __shfl_sync(0xffffffffu, arrived, 0);
    }
    ptx::fence_device();
    __syncwarp();
    return arrived != 0;
  }

  // Past the first-level cache: other CTAs wrote it. kAtOnce loads of 4 columns are in flight.
  template <int kAtOnce, int N>
  __device__ __forceinline__ void add(int other, float (&o)[N], RowEnd (&ends)[2]) const {
    float own[2], others[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float theirs = __ldcg(lse(other) + 8 * r), top = fmaxf(ends[r].lse, theirs);
      own[r] = weight_of(ends[r].lse, top);
      others[r] = weight_of(theirs, top);
      const float sum = own[r] + others[r], inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      own[r] *= inverse;
      others[r] *= inverse;
      ends[r].lse = sum > 0.0f ? top + kLn2 * __log2f(sum) : -INFINITY;
    }
    const float4* from = out<N>(other);
#pragma unroll
    for (int first = 0; first < N / 4; first += kAtOnce) {
      float4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i < N / 4) x[i] = __ldcg(from + 32 * (first + i));
      float done = 0.0f;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= N / 4) continue;
        float* mine = o + 4 * (first + i);
        mine[0] = sum_of(mine[0], own[0], x[i].x, others[0]);
        mine[1] = sum_of(mine[1], own[0], x[i].y, others[0]);
        mine[2] = sum_of(mine[2], own[1], x[i].z, others[1]);
        mine[3] = sum_of(mine[3], own[1], x[i].w, others[1]);
        done += fabsf(mine[0]) + fabsf(mine[1]) + fabsf(mine[2]) + fabsf(mine[3]);
      }
      // The assembler would have all loads in flight, and spill.
      if (kAtOnce < N / 8) ptx::wait_no_earlier(done);
    }
  }

  __device__ __forceinline__ static float weight_of(float lse, float top) {
    return lse == -INFINITY ? 0.0f : ptx::exp2_approx((lse - top) * kLog2E);
  }

  // The same whichever comes first.
  __device__ __forceinline__ static float sum_of(float a, float weight_a, float b, float weight_b) {
    return __fadd_rn(__fmul_rn(a, weight_a), __fmul_rn(b, weight_b));
  }
};

// What becomes of a piece's rows; `row` is the thread's first row of the tile. A whole warp, with
// 4 * kAtOnce registers to spare.
template <class Element, int kAtOnce, int N>
__device__ __forceinline__ void finish_rows(const AttendParams& params, const LoadedPiece& piece,
                                            int row, float (&o)[N], const RowState& rows) {
  row = ptx::not_before(row);
  RowEnd ends[2] = {end_of(rows, 0, params.sm_scale), end_of(rows, 1, params.sm_scale)};
  if (piece.parts > 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] *= ends[i / 2 % 2].inverse;
    ends[0].inverse = ends[1].inverse = 1.0f;
    Meeting meeting(params, piece, row);
    for (int step = 1; step < piece.parts; step *= 2) {
      const bool is_earlier = meeting.first / step % 2 == 0;
      const int other = is_earlier ? meeting.first + step : meeting.first - step;
      if (other >= piece.parts) continue;
      if (!meeting.is_second(other, o, ends)) return;
      meeting.template add<kAtOnce>(other, o, ends);
      meeting.first = min(meeting.first, other);
    }
  }
  store_rows<Element>(params, piece.item, row, o, ends);
}

}  // namespace compactattn
