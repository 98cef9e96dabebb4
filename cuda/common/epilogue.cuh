// What becomes of finished rows: a thread holds 2 rows, 8 apart, of its warp's 16 rows of O, N / 2
// columns each, laid out as the accumulators of 8-column products (softmax.cuh).
#pragma once

#include "softmax.cuh"
#include "work.cuh"

namespace compactattn {

// A finished row: lse, and what O is to be multiplied by. Rows that saw nothing are 0 and -inf.
struct RowEnd {
  float inverse;
  float lse;
};

__device__ __forceinline__ RowEnd end_of(const RowState& rows, int r, float sm_scale) {
  const float sum = quad_sum(rows.sum[r]);
  if (!(sum > 0.0f)) return {0.0f, -INFINITY};
  return {1.0f / sum, rows.max[r] * sm_scale + kLn2 * __log2f(sum)};
}

// The rows of an item; `row` is the thread's first row of the tile.
template <class Element, int N>
__device__ __forceinline__ void store_rows(const AttendParams& params, const WorkItem& item,
                                           int row, const float (&o)[N], const RowEnd (&ends)[2]) {
  const Results& results = params.results;
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowEnd& end = ends[r];
    const QueryRow mine = query_row(item, params.work.heads_per_list, row + 8 * r);
    const int64_t head = item.q_head + mine.head;
    const int64_t token = item.q_token + mine.token;
    uint8_t* out = static_cast<uint8_t*>(results.out) +
                   2 * (token * results.out_token_stride + head * results.out_head_stride);
#pragma unroll
    for (int block = 0; block < N / 16; ++block) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int i = 16 * block + 4 * w + 2 * r;
        words[w] = pack_pair<Element>(o[i] * end.inverse, o[i + 1] * end.inverse);
      }
      const uint4 whole = quad_transpose(words, quad_lane);
      if (mine.used) reinterpret_cast<uint4*>(out)[4 * block + quad_lane] = whole;
    }
    if (mine.used && results.lse != nullptr && quad_lane == 0) {
      results.lse[token * results.lse_token_stride + head * results.lse_head_stride] = end.lse;
    }
  }
}

}  // namespace compactattn
