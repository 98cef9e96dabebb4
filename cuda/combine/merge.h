// What the host hands to merge: plain data with fixed sizes, mirrored in rust/cuda/merge.rs. All
// pointers are device memory; strides count elements.
#pragma once

#include <cstdint>

namespace compactattn {

// One result: rows of `out` and the log-sum-exp of each.
struct MergeSide {
  const void* out;   // [total_q, num_q_heads, head_dim], 16-byte aligned, strides multiples of 8
  const float* lse;  // [num_q_heads, total_q], natural log; -inf where the side saw nothing
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_head_stride;
};
static_assert(sizeof(MergeSide) == 40, "host code writes this layout");

// Two results of the same queries over disjoint KV, and where their union goes.
struct MergeParams {
  MergeSide a;
  MergeSide b;
  void* out;   // as a.out, apart from all that is read
  float* lse;  // as a.lse; may be null
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_head_stride;
  int32_t total_q;
  int32_t num_q_heads;
  int32_t head_dim;  // a multiple of 8
  int32_t reserved;
};
static_assert(sizeof(MergeParams) == 136, "host code writes this layout");

}  // namespace compactattn
