// combine: the pieces of a cut item meet two by two or four by four in a fixed tree, warp by warp:
// whichever of them comes last adds the others' rows to its own, and goes on. Nobody waits. Sums do
// not depend on who came last, so every run gives the same bits: a softmax is put together from its
// parts in any order (online normaliser, arXiv 1805.02867), all addends are rounded before they are
// added, and they are added two by two. 9 parts meet four times in a row two by two, each time with
// a way to memory and back, and twice four by four, which takes registers that not every kernel
// has.
#pragma once

#include "../common/epilogue.cuh"
#include "../ptx/grid.cuh"

namespace compactattn {

constexpr int kWarpRows = 16;  // that a warp's accumulators hold
static_assert(kTileRows == kWarpRows * kArrivals, "who has arrived is counted by 16 rows");

// A warp's 16 rows of an item's parts from `first` on, divided by their sums; kMembers meet.
template <int kMembers>
struct Meeting {
  static_assert(kMembers == 2 || kMembers == 4);
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

  // Where the parts of step `step` meet whose first is `leader`: one place a meeting.
  __device__ __forceinline__ int32_t* arrivals(int leader, int step) const {
    return params.work.arrivals + (first_cta + leader + step) * kArrivals + row / kWarpRows;
  }

  // Whether all others are there. If not, ours are left for who comes last.
  template <int N>
  __device__ __forceinline__ bool is_last(int32_t* arrivals, int others, const float (&o)[N],
                                          const RowEnd (&ends)[2]) const {
    const int lane = thread % 32;
    int arrived = lane == 0 ? *static_cast<volatile int32_t*>(arrivals) : 0;
    arrived = __shfl_sync(0xffffffffu, arrived, 0);
    if (arrived != others) {
      leave(o, ends);
      __syncwarp();
      if (lane == 0) {
        ptx::fence_device();
        arrived = atomicAdd(arrivals, 1);
      }
      arrived = __shfl_sync(0xffffffffu, arrived, 0);
    }
    ptx::fence_device();
    __syncwarp();
    return arrived == others;
  }

  // Adds the `members` parts `step` apart from `leader` on, of which this is one. Past the
  // first-level cache: other CTAs wrote them. kAtOnce loads of 4 columns are in flight, of each.
  template <int kAtOnce, int N>
  __device__ __forceinline__ void add(int leader, int step, int members, float (&o)[N],
                                      RowEnd (&ends)[2]) const {
    // Ours, the one that ours is added to, and the two of the other sum.
    const int mine = (first - leader) / step;
    const float4* from[kMembers];
    bool comes[kMembers];
    float weights[kMembers][2];
#pragma unroll
    for (int m = 1; m < kMembers; ++m) {
      comes[m] = (mine ^ m) < members;
      const int part = leader + (comes[m] ? mine ^ m : mine) * step;
      from[m] = out<N>(part);
#pragma unroll
      for (int r = 0; r < 2; ++r) weights[m][r] = comes[m] ? __ldcg(lse(part) + 8 * r) : -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[0][r] = ends[r].lse;
      ends[r].lse = weigh(weights, r);
    }
#pragma unroll
    for (int at = 0; at < N / 4; at += kAtOnce) {
      float4 x[kMembers][kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int m = 1; m < kMembers; ++m)
          if (at + i < N / 4) x[m][i] = comes[m] ? __ldcg(from[m] + 32 * (at + i)) : float4{};
      }
      float done = 0.0f;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i >= N / 4) continue;
        float* to = o + 4 * (at + i);
        x[0][i] = {to[0], to[1], to[2], to[3]};
        to[0] = sum_of(weights, 0, [&](int m) { return x[m][i].x; });
        to[1] = sum_of(weights, 0, [&](int m) { return x[m][i].y; });
        to[2] = sum_of(weights, 1, [&](int m) { return x[m][i].z; });
        to[3] = sum_of(weights, 1, [&](int m) { return x[m][i].w; });
        done += fabsf(to[0]) + fabsf(to[1]) + fabsf(to[2]) + fabsf(to[3]);
      }
      // The assembler would have all loads in flight, and spill.
      if (kAtOnce < N / 8) ptx::wait_no_earlier(done);
    }
  }

  // Row r's weights from its parts' LSE; the LSE of all.
  __device__ __forceinline__ static float weigh(float (&weights)[kMembers][2], int r) {
    float top = weights[0][r];
#pragma unroll
    for (int m = 1; m < kMembers; ++m) top = fmaxf(top, weights[m][r]);
#pragma unroll
    for (int m = 0; m < kMembers; ++m)
      weights[m][r] =
          weights[m][r] == -INFINITY ? 0.0f : ptx::exp2_approx((weights[m][r] - top) * kLog2E);
    const float sum = in_pairs([&](int m) { return weights[m][r]; });
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int m = 0; m < kMembers; ++m) weights[m][r] *= inverse;
    return sum > 0.0f ? top + kLn2 * __log2f(sum) : -INFINITY;
  }

  template <class Value>
  __device__ __forceinline__ static float sum_of(const float (&weights)[kMembers][2], int r,
                                                 const Value& value) {
    return in_pairs([&](int m) { return __fmul_rn(value(m), weights[m][r]); });
  }

  // The same whoever comes last: ours and who it is added to, then the other two.
  template <class Value>
  __device__ __forceinline__ static float in_pairs(const Value& value) {
    const float ours = __fadd_rn(value(0), value(1));
    if constexpr (kMembers == 2) return ours;
    return __fadd_rn(ours, __fadd_rn(value(kMembers - 2), value(kMembers - 1)));
  }
};

// What becomes of a piece's rows; `row` is the thread's first row of the tile. A whole warp, with
// 4 * (kMembers - 1) * kAtOnce registers to spare.
template <class Element, int kMembers, int kAtOnce, int N>
__device__ __forceinline__ void finish_rows(const AttendParams& params, const LoadedPiece& piece,
                                            int row, float (&o)[N], const RowState& rows) {
  row = ptx::not_before(row);
  RowEnd ends[2] = {end_of(rows, 0, params.sm_scale), end_of(rows, 1, params.sm_scale)};
  if (piece.parts > 1) {
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] *= ends[i / 2 % 2].inverse;
    ends[0].inverse = ends[1].inverse = 1.0f;
    Meeting<kMembers> meeting(params, piece, row);
    for (int step = 1; step < piece.parts; step *= kMembers) {
      const int leader = meeting.first - meeting.first % (kMembers * step);
      const int members = min(kMembers, (piece.parts - leader + step - 1) / step);
      if (members == 1) continue;
      if (!meeting.is_last(meeting.arrivals(leader, step), members - 1, o, ends)) return;
      meeting.template add<kAtOnce>(leader, step, members, o, ends);
      meeting.first = leader;
    }
  }
  store_rows<Element>(params, piece.item, row, o, ends);
}

}  // namespace compactattn
