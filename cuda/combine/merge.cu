// merge: two results of the same queries over disjoint KV to the result over both
// (rust/capi/merge.rs).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/math.cuh"
#include "merge.h"

namespace compactattn {
namespace {

constexpr int kElements = 8;  // of a thread and turn: 16 bytes

// Each side's share of a row's weight, and the log of their sum.
struct Shares {
  float a;
  float b;
  float lse;
};

// Whole-precision exponentials: an empty side must leave the other as it is, bit for bit.
__device__ Shares shares_of(float a, float b) {
  // A row that went wrong on one side is wrong, though fmaxf would prefer the other side.
  if (isnan(a) || isnan(b)) return {a + b, a + b, a + b};
  const float most = fmaxf(a, b);
  if (most == -INFINITY) return {0.0f, 0.0f, most};
  const float weight_a = expf(a - most), weight_b = expf(b - most);
  const float sum = weight_a + weight_b;
  return {weight_a / sum, weight_b / sum, most + logf(sum)};
}

template <class Element>
__device__ float2 widen(uint32_t pair);

template <>
__device__ float2 widen<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

template <>
__device__ float2 widen<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// A side without weight adds nothing, whatever its row holds.
__device__ float weighed(float share, float x) { return share == 0.0f ? 0.0f : share * x; }

template <class Element>
__device__ uint32_t mix(const Shares& shares, uint32_t pair_a, uint32_t pair_b) {
  const float2 a = widen<Element>(pair_a), b = widen<Element>(pair_b);
  return pack_pair<Element>(weighed(shares.a, a.x) + weighed(shares.b, b.x),
                            weighed(shares.a, a.y) + weighed(shares.b, b.y));
}

__device__ uint4 load_row(const MergeSide& side, int64_t token, int64_t head, int vector) {
  const uint8_t* row = static_cast<const uint8_t*>(side.out) +
                       2 * (token * side.out_token_stride + head * side.out_head_stride);
  return reinterpret_cast<const uint4*>(row)[vector];
}

// Any grid x 256: threads take vectors of 8 elements in turn.
template <class Element>
__device__ void merge(const MergeParams& params) {
  const int vectors = params.head_dim / kElements;
  const int64_t heads = params.num_q_heads, total = params.total_q * heads * vectors;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += step) {
    const int64_t row = i / vectors, token = row / heads, head = row - token * heads;
    const int vector = static_cast<int>(i - row * vectors);
    const Shares shares = shares_of(params.a.lse[head * params.a.lse_head_stride + token],
                                    params.b.lse[head * params.b.lse_head_stride + token]);
    const uint4 a = load_row(params.a, token, head, vector);
    const uint4 b = load_row(params.b, token, head, vector);
    uint8_t* out = static_cast<uint8_t*>(params.out) +
                   2 * (token * params.out_token_stride + head * params.out_head_stride);
    reinterpret_cast<uint4*>(out)[vector] = {
        mix<Element>(shares, a.x, b.x), mix<Element>(shares, a.y, b.y),
        mix<Element>(shares, a.z, b.z), mix<Element>(shares, a.w, b.w)};
    if (vector == 0 && params.lse != nullptr)
      params.lse[head * params.lse_head_stride + token] = shares.lse;
  }
}

}  // namespace
}  // namespace compactattn

#define MERGE(name, Element)                                          \
  extern "C" __global__ void __launch_bounds__(256)                   \
      name(const __grid_constant__ compactattn::MergeParams params) { \
    compactattn::merge<Element>(params);                              \
  }

MERGE(compactattn_merge_bf16, __nv_bfloat16)
MERGE(compactattn_merge_fp16, __half)
