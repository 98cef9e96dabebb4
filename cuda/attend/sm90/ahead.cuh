// Weights of a tile on maxima of the tiles before it: the tile's own need not be known before its
// first exponential, and are hardly ever needed at all.
//
// FlashAttention-4 (arXiv 2603.05451) keeps an old maximum while no row grows by more than 2^8;
// here the sums that are made anyway tell, for P is not negative and so no greater than its sum.
#pragma once

#include "../../common/softmax.cuh"
#include "products.cuh"

namespace compactattn::sm90 {

// A thread's share of a row's sum over one tile up to which P keeps an old maximum: none of P is
// above it then, as where the tile's maximum itself is looked at (kRescaleAbove).
template <class T>
constexpr float kMostAhead = static_cast<float>(1 << static_cast<int>(T::kRescaleAbove));
// And up to which P can be moved to another maximum by a factor: neither is it rounded to infinity
// nor the factor to 0.
constexpr float kMostMoved = 0x1p100f;

// s = exp2((s - max) * scale) on maxima of tiles before, with this tile's `sums`; whether
// they are too far above kMostAhead, or NaN as where a row has seen nothing yet, for one row of the
// warp. Saves the tile's maxima, which stand before the first exponential and take half the time of
// all of them.
template <class T, int N>
__device__ __forceinline__ bool exponentiate_ahead(float (&s)[N], float scale, const RowState& rows,
                                                   float (&sums)[2]) {
  const float shift[2] = {rows.max[0] * scale, rows.max[1] * scale};
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = ptx::exp2_approx(s[i] * scale - shift[i / 2 % 2]);
  float chain[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
  for (int i = 4; i < N; ++i) chain[i % 4] += s[i];
  sums[0] = chain[0] + chain[1];
  sums[1] = chain[2] + chain[3];
  return __any_sync(0xffffffffu, !(sums[0] <= kMostAhead<T>) || !(sums[1] <= kMostAhead<T>));
}

// Moves P, whose `sums` are at most kMostMoved, to maxima of this tile; O is to be multiplied by
// `factor`.
template <int N>
__device__ __forceinline__ void move_up(float (&p)[N], float scale, RowState& rows,
                                        float (&sums)[2], float (&factor)[2]) {
  float top[2];
  tile_max(p, top);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float powers = fmaxf(0.0f, floorf(ptx::log2_approx(top[r])));
    const float raised = rows.max[r] + __fdividef(powers, scale);
    factor[r] = ptx::exp2_approx(rows.max[r] * scale - raised * scale);
    rows.max[r] = raised;
    rows.sum[r] *= factor[r];
    sums[r] *= factor[r];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] *= factor[i / 2 % 2];
}

// S = Q K^T once more, of the warp's own 16 rows and without the other warps: Q in registers is
// laid out for warp products too. A loop that passes the scores on, for it is taken hardly ever and
// what an unrolled one would hold is taken from the others' registers.
template <class T>
__device__ __forceinline__ void scores_again(float (&s)[T::kScores], const Queries<T>& q,
                                             const uint8_t* k, int lane) {
  static_assert(!T::kSharedQueries);
  const int row = lane % 8;
  const uint8_t* tokens = k + row * T::kRowBytes;
#pragma unroll 1
  for (int n = 0; n < T::kTokens / 8; ++n) {
    float d[4] = {};
#pragma unroll
    for (int step = 0; step < T::kDimSteps; step += 2) {
      const int chunk = step % 4 * 2 + lane / 8;
      uint32_t b[4];
      ptx::load_matrices(b, tokens + step / 4 * T::kKvGroupBytes + (chunk ^ row) * 16);
      ptx::mma<typename T::Element>(d, q.registers[step], b[0], b[1]);
      ptx::mma<typename T::Element>(d, q.registers[step + 1], b[2], b[3]);
    }
    tokens += 8 * T::kRowBytes;
#pragma unroll
    for (int i = 0; i < T::kScores; ++i) s[i] = i + 4 < T::kScores ? s[i + 4] : d[i % 4];
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
}

}  // namespace compactattn::sm90
