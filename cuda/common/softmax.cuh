// Online softmax over accumulator fragments: a thread holds 2 rows x N / 2 columns of the
// scores.
//
// Score `i` of a thread is row (i / 2) % 2, column 8 * (i / 4) + i % 2, counted from the thread's
// first row and column. Maxima are of raw q . k; `scale` = sm_scale * log2(e) takes them to powers
// of two (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "math.cuh"

namespace compactattn {

struct RowState {
  float max[2];  // of the columns so far, or an older maximum not far below it
  float sum[2];  // this thread's share
};

__device__ __forceinline__ void reset(RowState& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.max[r] = -INFINITY;
    rows.sum[r] = 0.0f;
  }
}

// Drops the columns that a row may not see; `visible` counts from the thread's first column of this
// tile.
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N], const int (&visible)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (8 * (i / 4) + i % 2 >= visible[i / 2 % 2]) s[i] = -INFINITY;
  }
}

// Row maxima of the tile over the quad; two chains a row halve the dependent steps.
template <int N>
__device__ __forceinline__ void tile_max(const float (&s)[N], float (&out)[2]) {
  float chain[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
  for (int i = 4; i < N; ++i) chain[i % 4] = fmaxf(chain[i % 4], s[i]);
  out[0] = quad_max(fmaxf(chain[0], chain[1]));
  out[1] = quad_max(fmaxf(chain[2], chain[3]));
}

// Moves the reference maxima up where the tile asks for it; whether O must be multiplied by
// `factor`.
template <class T>
__device__ __forceinline__ bool raise_max(const float (&tile)[2], float scale, RowState& rows,
                                          float (&factor)[2]) {
  if constexpr (T::kRescaleAbove > 0.0f) {
    const bool grown = (tile[0] - rows.max[0]) * scale > T::kRescaleAbove ||
                       (tile[1] - rows.max[1]) * scale > T::kRescaleAbove;
    if (!__any_sync(0xffffffffu, grown)) return false;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(rows.max[r], tile[r]);
    // A row that has seen nothing: its sums are 0, and -inf - -inf must not turn them into NaN.
    factor[r] = top == -INFINITY ? 1.0f : ptx::exp2_approx((rows.max[r] - top) * scale);
    rows.max[r] = top;
    rows.sum[r] *= factor[r];
  }
  return true;
}

// s = exp2((s - max) * scale), sums added up. `kMasked`: rows may have seen nothing yet.
template <bool kMasked, int N>
__device__ __forceinline__ void exponentiate(float (&s)[N], float scale, RowState& rows) {
  float shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] = kMasked && rows.max[r] == -INFINITY ? 0.0f : rows.max[r] * scale;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = ptx::exp2_approx(s[i] * scale - shift[i / 2 % 2]);
  float chain[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
  for (int i = 4; i < N; ++i) chain[i % 4] += s[i];
  rows.sum[0] += chain[0] + chain[1];
  rows.sum[1] += chain[2] + chain[3];
}

// O of both rows times `factor`.
template <int N>
__device__ __forceinline__ void rescale(float (&o)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) o[i] *= factor[i / 2 % 2];
}

// Scores as the left operand of the next product: steps of 16 columns, 4 words each.
template <class Element, int N>
__device__ __forceinline__ void pack(const float (&s)[N], uint32_t (&p)[N / 8][4]) {
#pragma unroll
  for (int step = 0; step < N / 8; ++step) {
#pragma unroll
    for (int w = 0; w < 4; ++w)
      p[step][w] = pack_pair<Element>(s[8 * step + 2 * w], s[8 * step + 2 * w + 1]);
  }
}

}  // namespace compactattn
