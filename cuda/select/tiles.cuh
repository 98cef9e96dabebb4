// What the scorers share: where vectors lie, and products of tiles in shared memory.
#pragma once

#include <cfloat>

#include "../common/math.cuh"
#include "../params.h"
#include "../ptx/mma.cuh"

namespace compactattn {

constexpr float kInfinity = __builtin_huge_valf();
// Rows of a tile are this much longer than their vectors, so that eight rows lie in different
// banks for every head_dim.
constexpr int kPadBytes = 16;

__device__ __forceinline__ int past_blocks_of(const Step& step, const Span& span) {
  return span.past >> step.layout.log2_block_tokens;
}

// KV tokens that token `i` of the span sees; spans that are not dense have a past, so at least 1.
__device__ __forceinline__ int visible_to(const Span& span, int i) {
  return span.kv_end + i + 1 - span.len;
}

// The span of this CTA, if it is one that needs scores.
__device__ __forceinline__ bool load_span(const Step& step, int index, Span& span) {
  if (index >= step.stages.counters->num_select_spans) return false;
  span = step.stages.select_spans[index];
  return !span.dense;
}

// Row of scores of one span and query head: [max_blocks].
__device__ __forceinline__ float* scores_of(const Step& step, int span, int q_head) {
  const int64_t row = static_cast<int64_t>(span) * step.layout.num_q_heads + q_head;
  return step.stages.scores + row * step.layout.max_blocks;
}

__device__ __forceinline__ int page_of(const Step& step, int req, int token) {
  const int64_t row = req * step.batch.table_stride;
  return __ldg(step.batch.block_table + row + (token >> step.layout.log2_page_tokens));
}

template <class Element>
__device__ __forceinline__ const Element* key_at(const Step& step, int req, int kv_head,
                                                 int token) {
  const Batch& batch = step.batch;
  const int within = token & ((1 << step.layout.log2_page_tokens) - 1);
  return static_cast<const Element*>(batch.k) + page_of(step, req, token) * batch.k_page_stride +
         within * batch.k_token_stride + kv_head * batch.k_head_stride;
}

// `token` counts over the packed q.
template <class Element>
__device__ __forceinline__ const Element* query_at(const Step& step, int token, int q_head) {
  return static_cast<const Element*>(step.batch.q) + token * step.batch.q_token_stride +
         q_head * step.batch.q_head_stride;
}

// The larger of two numbers; NaN if either is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  return isnan(a) || isnan(b) ? a + b : fmaxf(a, b);
}

// Into [0, 1]; NaN stays.
__device__ __forceinline__ float clamp_unit(float x) { return x < 0.f ? 0.f : x > 1.f ? 1.f : x; }

// Weight `sum * 2^max`, in logits of base 2; NaN and +inf among the logits make `sum` NaN.
struct LogSum {
  float max = -FLT_MAX;
  float sum = 0.f;

  __device__ __forceinline__ void add(float x) {
    const float one = x - x + 1.f;  // NaN unless x is finite
    merge({fmaxf(x, -FLT_MAX), isinf(x) && x < 0.f ? 0.f : one});
  }

  __device__ __forceinline__ void merge(const LogSum& other) {
    const float most = fmaxf(max, other.max);
    sum = sum * ptx::exp2_approx(max - most) + other.sum * ptx::exp2_approx(other.max - most);
    max = most;
  }

  __device__ __forceinline__ LogSum of_lane(int mask) const {
    return {__shfl_xor_sync(0xffffffffu, max, mask), __shfl_xor_sync(0xffffffffu, sum, mask)};
  }

  // -inf where nothing weighs.
  __device__ __forceinline__ float log2() const { return max + log2f(sum); }
};

template <class Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}

// Byte offset that this lane names to load a 16 x 16 piece of a tile as operand a.
__device__ __forceinline__ uint32_t offset_a(int lane, int row_bytes) {
  return (lane % 16) * row_bytes + (lane / 16) * 16;
}

// The same for 16 columns x 16 deep of operand b: matrices 0, 1 are columns 0..7.
__device__ __forceinline__ uint32_t offset_b(int lane, int row_bytes) {
  return ((lane / 16) * 8 + lane % 8) * row_bytes + (lane / 8 % 2) * 16;
}

// 16 deep of operand b, 16 * kPairs columns from `address` on.
template <int kPairs>
__device__ __forceinline__ void load_b(uint32_t (&b)[kPairs][4], uint32_t address, int row_bytes) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) ptx::load_matrices(b[n], address + n * 16 * row_bytes);
}

// c [32, 16 * kPairs] += a [32, 16] . b^T; `a` is the address of the first row.
template <class Element, int kPairs>
__device__ __forceinline__ void multiply_32(float (&c)[2][2 * kPairs][4], uint32_t a, int row_bytes,
                                            const uint32_t (&b)[kPairs][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t rows[4];
    ptx::load_matrices(rows, a + m * 16 * row_bytes);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      ptx::mma<Element>(c[m][2 * n], rows, b[n][0], b[n][1]);
      ptx::mma<Element>(c[m][2 * n + 1], rows, b[n][2], b[n][3]);
    }
  }
}

}  // namespace compactattn
