// Mean rows of the requests that leave blocks out: f32 means under the pages of their blocks become
// means of runs, in the type that attend multiplies and the units of the pool, and what each list
// leaves out of them is counted (cuda/common/means.cuh).
#pragma once

#include "../common/e4m3.cuh"
#include "../common/math.cuh"
#include "../common/means.cuh"

namespace compactattn {

constexpr int kUnit = 4;  // elements of one store

// One CTA of those that share the writing, of every thread.
struct Writers {
  int cta;
  int num_ctas;

  __device__ __forceinline__ int64_t first() const {
    return static_cast<int64_t>(cta) * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ int64_t stride() const {
    return static_cast<int64_t>(num_ctas) * blockDim.x;
  }
};

// What one span's request has of means; none where its lists read everything.
struct MeanRow {
  int req;
  int blocks;
  int count;
  int padded;  // to whole tiles
};

__device__ __forceinline__ MeanRow mean_row(const Means& means, const Span& span) {
  if (span.dense && !means.every_span) return {span.req, 0, 0, 0};
  const int count = means_of(means, span.past);
  const int padded = (count + kTileTokens - 1) / kTileTokens * kTileTokens;
  return {span.req, span.past >> means.log2_block_tokens, count, padded};
}

// Where the block's mean lies, of all KV heads.
__device__ __forceinline__ int64_t mean_offset(const Step& step, const Means& means, int req,
                                               int block) {
  const int log2_page = step.layout.log2_page_tokens, log2_block = means.log2_block_tokens;
  const int slots = 1 << max(0, log2_page - log2_block);
  const int last = ((block + 1) << log2_block) - 1;
  const int64_t page =
      __ldg(step.batch.block_table + req * step.batch.table_stride + (last >> log2_page));
  return (page * slots + (block & (slots - 1))) * means.num_kv_heads * means.head_dim;
}

// Unit `unit` of a run's [num_kv_heads, head_dim].
template <class Element>
__device__ __forceinline__ uint2 narrow_unit(const Step& step, const Means& means, bool is_value,
                                             const MeanRow& row, int mean, int unit) {
  if (mean >= row.count) return uint2{};
  const int begin = mean << means.log2_blocks;
  const int end = min(row.blocks, (mean + 1) << means.log2_blocks);
  const float* from = (is_value ? means.v_mean : means.k_mean) + unit * kUnit;
  float4 sum{};
#pragma unroll 4
  for (int block = begin; block < end; ++block) {
    const int64_t offset = mean_offset(step, means, row.req, block);
    const float4 x = __ldg(reinterpret_cast<const float4*>(from + offset));
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  const int head = unit * kUnit / means.head_dim;
  // Of caches that are not e4m3, 1.
  const float unit_of = is_value ? value_scale(step.batch, head) : key_scale(step.batch, head);
  const float by = 1.0f / (unit_of * static_cast<float>(end - begin));
  return {pack_pair<Element>(sum.x * by, sum.y * by), pack_pair<Element>(sum.z * by, sum.w * by)};
}

// The means of a request.
template <class Element>
__device__ __forceinline__ void narrow_row(const Step& step, const Means& means, const MeanRow& row,
                                           const Writers& writers) {
  const int per_head = means.head_dim / kUnit, per_mean = means.num_kv_heads * per_head;
  const int64_t units = static_cast<int64_t>(row.padded) * per_mean;  // of keys, as many of values
  for (int64_t i = writers.first(); i < 2 * units; i += writers.stride()) {
    const bool is_value = i >= units;
    const int64_t rest = is_value ? i - units : i;
    const int mean = static_cast<int>(rest / per_mean);
    const int unit = static_cast<int>(rest - static_cast<int64_t>(mean) * per_mean);
    const int head = unit / per_head;
    const int64_t to = (static_cast<int64_t>(row.req) * means.num_kv_heads + head) * means.rows;
    uint2* into = static_cast<uint2*>(is_value ? means.v : means.k);
    into[(to + mean) * per_head + unit - head * per_head] =
        narrow_unit<Element>(step, means, is_value, row, mean, unit);
  }
}

// Blocks of a run that a list does not read.
__device__ __forceinline__ uint32_t skipped_of_run(const Means& means, const uint32_t* bits,
                                                   const MeanRow& row, int mean) {
  const int first = mean << means.log2_blocks;
  const int count = min(1 << means.log2_blocks, row.blocks - first);
  if (count <= 0) return 0;
  // A run lies within a word: both are powers of two.
  return __popc(~__ldg(bits + first / 32) >> first % 32 & range_word(0, 0, count));
}

// What the lists of span `index` leave out, four columns a store.
__device__ __forceinline__ void count_skipped(const Means& means, int index, const MeanRow& row,
                                              const Writers& writers) {
  const int per_list = row.padded / 4;
  const int64_t words = static_cast<int64_t>(per_list) * means.lists_per_span;
  for (int64_t i = writers.first(); i < words; i += writers.stride()) {
    const int list = static_cast<int>(i / per_list), word = static_cast<int>(i % per_list);
    const int64_t list_row = static_cast<int64_t>(index) * means.lists_per_span + list;
    const uint32_t* bits = means.lists + list_row * means.mask_words;
    const int tile = 4 * word / kTileTokens * kTileTokens, place = 4 * word % kTileTokens;
    uint32_t counts = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      counts |= skipped_of_run(means, bits, row, tile + column_at(place + j)) << 8 * j;
    reinterpret_cast<uint32_t*>(means.skipped + list_row * means.rows)[word] = counts;
  }
}

// Every row of the step. Spans of a request follow each other and are dense together: the first
// writes the means for all.
template <class Element>
__device__ __forceinline__ void narrow_means(const Step& step, const Means& means,
                                             const Writers& writers) {
  for (int index = 0; index < step.stages.counters->num_list_spans; ++index) {
    const Span& span = means.spans[index];
    const MeanRow row = mean_row(means, span);
    count_skipped(means, index, row, writers);
    if (index == 0 || means.spans[index - 1].req != span.req)
      narrow_row<Element>(step, means, row, writers);
  }
}

}  // namespace compactattn
