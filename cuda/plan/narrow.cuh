// Mean rows of the requests that leave blocks out: f32 means under the pages of their blocks become
// the type that attend multiplies, in the units of the pool, block after block
// (cuda/common/means.cuh).
#pragma once

#include "../common/e4m3.cuh"
#include "../common/math.cuh"
#include "../common/means.cuh"

namespace compactattn {

constexpr int kUnit = 8;  // elements of one store

// What one span's request asks for, in units: means of its blocks, then zeros to the end of the
// last block's tile.
struct MeanRow {
  int req;
  int blocks;
  int64_t units;  // of keys, as many of values
};

// Spans of a request follow each other and are dense together: the first does it for all.
__device__ __forceinline__ MeanRow mean_row(const Step& step, const Means& means, int index) {
  const Span& span = means.spans[index];
  const bool is_first = index == 0 || means.spans[index - 1].req != span.req;
  const int blocks = span.past >> means.log2_block_tokens;
  if (!is_first || span.dense || blocks == 0) return {span.req, blocks, 0};
  const int64_t padded = (blocks + kTileTokens - 1) / kTileTokens * kTileTokens;
  return {span.req, blocks, padded * (means.num_kv_heads * means.head_dim / kUnit)};
}

// Unit `unit` of a block's [num_kv_heads, head_dim].
template <class Element>
__device__ __forceinline__ uint4 narrow_unit(const Step& step, const Means& means, bool is_value,
                                             const MeanRow& row, int block, int unit) {
  if (block >= row.blocks) return uint4{};
  const int log2_page = step.layout.log2_page_tokens, log2_block = means.log2_block_tokens;
  const int slots = 1 << max(0, log2_page - log2_block);
  const int last = ((block + 1) << log2_block) - 1;
  const int64_t page =
      __ldg(step.batch.block_table + row.req * step.batch.table_stride + (last >> log2_page));
  const int64_t slot = page * slots + (block & (slots - 1));
  const float* from = is_value ? means.v_mean : means.k_mean;
  const float4* at = reinterpret_cast<const float4*>(
      from + slot * means.num_kv_heads * means.head_dim + unit * kUnit);
  const float4 low = __ldg(at), high = __ldg(at + 1);
  const int head = unit * kUnit / means.head_dim;
  // Of caches that are not e4m3, 1.
  const float by = 1.0f / (is_value ? value_scale(step.batch, head) : key_scale(step.batch, head));
  return {pack_pair<Element>(low.x * by, low.y * by), pack_pair<Element>(low.z * by, low.w * by),
          pack_pair<Element>(high.x * by, high.y * by),
          pack_pair<Element>(high.z * by, high.w * by)};
}

// Every row of the step, by `num_ctas` CTAs of which this is one.
template <class Element>
__device__ __forceinline__ void narrow_means(const Step& step, const Means& means, int cta,
                                             int num_ctas) {
  const int per_head = means.head_dim / kUnit, per_block = means.num_kv_heads * per_head;
  const int64_t stride = static_cast<int64_t>(num_ctas) * blockDim.x;
  for (int span = 0; span < step.stages.counters->num_list_spans; ++span) {
    const MeanRow row = mean_row(step, means, span);
    for (int64_t i = static_cast<int64_t>(cta) * blockDim.x + threadIdx.x; i < 2 * row.units;
         i += stride) {
      const bool is_value = i >= row.units;
      const int64_t rest = is_value ? i - row.units : i;
      const int block = static_cast<int>(rest / per_block);
      const int unit = static_cast<int>(rest - static_cast<int64_t>(block) * per_block);
      const int head = unit / per_head;
      const int64_t to = (static_cast<int64_t>(row.req) * means.num_kv_heads + head) * means.rows;
      uint4* into = static_cast<uint4*>(is_value ? means.v : means.k);
      into[(to + block) * per_head + unit - head * per_head] =
          narrow_unit<Element>(step, means, is_value, row, block, unit);
    }
  }
}

}  // namespace compactattn
