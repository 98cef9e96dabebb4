// summaries: the mean key (and value) of whole blocks, per KV head, under the page of the block's
// last token (rust/summaries.rs).
//
// Grid (any > 0, num_kv_heads) x 128; total_q / block_size + num_reqs CTAs in x give each block
// that one step completes its own. Launched with the KV write, before batch: lengths and pages are
// checked here, and what is out of range is skipped. Sums are f64 in a fixed order: of 16-bit
// elements they are exact but for bf16 that differ by more than 2^37, so a mean is the CPU's.
#include "../common/math.cuh"
#include "../params.h"

namespace compactattn {
namespace {

constexpr int kThreads = 128;
constexpr int kUnit = 8;  // elements of one load

enum Which : int { kCompleted = 0, kAll = 1 };

// Whole blocks of one request to summarise: first .. first + count.
struct Blocks {
  int first;
  int count;
};

// None where lengths are out of range.
__device__ Blocks blocks_of(const Step& step, int req, int which) {
  const Batch& batch = step.batch;
  const int begin = batch.cu_seqlens_q[req], end = batch.cu_seqlens_q[req + 1];
  const int kv_len = batch.seq_lens[req];
  const int64_t room = static_cast<int64_t>(batch.table_width) << step.layout.log2_page_tokens;
  const bool is_sound = begin >= 0 && begin < end && end <= batch.total_q && kv_len >= 0 &&
                        kv_len <= step.layout.max_kv_len && kv_len <= room;
  if (!is_sound) return {0, 0};
  const int past = max(0, kv_len - (end - begin));
  const int first = which == kAll ? 0 : past >> step.layout.log2_block_tokens;
  return {first, (kv_len >> step.layout.log2_block_tokens) - first};
}

// A block of a request.
struct Found {
  int req;  // -1: none
  int block;
};

// Block `index` of all requests' blocks in a row; by one warp, which looks at 32 requests at once.
__device__ Found find(const Step& step, int64_t index, int which) {
  const int lane = threadIdx.x % 32;
  int64_t before = 0;
  for (int from = 0; from < step.batch.num_reqs; from += 32) {
    const int req = from + lane;
    const Blocks mine = req < step.batch.num_reqs ? blocks_of(step, req, which) : Blocks{0, 0};
    int64_t sum = mine.count;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    const uint32_t past = __ballot_sync(0xffffffffu, index < before + sum);
    const int64_t offset = index - (before + sum - mine.count);
    const int owner = __ffs(past) - 1;
    if (past) {
      const int block = static_cast<int>(mine.first + offset);
      return {from + owner, __shfl_sync(0xffffffffu, block, owner)};
    }
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  return {-1, 0};
}

// One pool of the cache.
struct Pool {
  const void* base;
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
};

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t word);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}

// Sums of 8 elements over every `lanes`-th token of the block.
template <class Element>
__device__ __forceinline__ void sum_tokens(const Step& step, const Pool& pool, const Found& at,
                                           int lanes, double (&sums)[kUnit]) {
  const Layout& layout = step.layout;
  const int units = layout.head_dim / kUnit;
  const int32_t* pages = step.batch.block_table + step.batch.table_stride * at.req;
  const Element* base = static_cast<const Element*>(pool.base) + blockIdx.y * pool.head_stride +
                        threadIdx.x % units * kUnit;
  const int start = at.block << layout.log2_block_tokens;
  for (int t = threadIdx.x / units; t < 1 << layout.log2_block_tokens; t += lanes) {
    const int64_t page = pages[(start + t) >> layout.log2_page_tokens];
    const int in_page = (start + t) & ((1 << layout.log2_page_tokens) - 1);
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(base + page * pool.page_stride +
                                                             in_page * pool.token_stride));
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<Element>(pairs[i]);
      sums[2 * i] += pair.x;
      sums[2 * i + 1] += pair.y;
    }
  }
}

// Mean of one block of the CTA's KV head, to `mean` [head_dim]; called by the whole CTA.
template <class Element>
__device__ __forceinline__ void write_mean(const Step& step, const Pool& pool, const Found& at,
                                           float* mean) {
  __shared__ double partial[kThreads * kUnit];
  const Layout& layout = step.layout;
  const int units = layout.head_dim / kUnit, lanes = kThreads / units;
  if (static_cast<int>(threadIdx.x) < lanes * units) {
    double sums[kUnit] = {};
    sum_tokens<Element>(step, pool, at, lanes, sums);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) partial[threadIdx.x * kUnit + i] = sums[i];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < layout.head_dim; d += kThreads) {
    double sum = 0.0;
    for (int lane = 0; lane < lanes; ++lane) sum += partial[lane * layout.head_dim + d];
    mean[d] = static_cast<float>(sum / (1 << layout.log2_block_tokens));
  }
  __syncthreads();
}

// Whether every page of the block lies in the pool.
__device__ bool has_pages(const Step& step, const Found& at) {
  const int32_t* pages = step.batch.block_table + step.batch.table_stride * at.req;
  const int start = at.block << step.layout.log2_block_tokens;
  const int last = start + (1 << step.layout.log2_block_tokens) - 1;
  const int log2_page = step.layout.log2_page_tokens;
  for (int p = start >> log2_page; p <= last >> log2_page; ++p) {
    if (pages[p] < 0 || pages[p] >= step.batch.num_pages) return false;
  }
  return true;
}

template <class Element>
__device__ __forceinline__ void summarise(const Step& step, float* k_mean, float* v_mean,
                                          int which) {
  const Batch& batch = step.batch;
  const Layout& layout = step.layout;
  const int slots = 1 << max(0, layout.log2_page_tokens - layout.log2_block_tokens);
  const Pool k{batch.k, batch.k_page_stride, batch.k_token_stride, batch.k_head_stride};
  const Pool v{batch.v, batch.v_page_stride, batch.v_token_stride, batch.v_head_stride};
  for (int64_t i = blockIdx.x;; i += gridDim.x) {
    const Found at = find(step, i, which);
    if (at.req < 0) return;
    if (!has_pages(step, at)) continue;
    const int last = ((at.block + 1) << layout.log2_block_tokens) - 1;
    const int64_t page =
        batch.block_table[batch.table_stride * at.req + (last >> layout.log2_page_tokens)];
    const int64_t slot = page * slots + (at.block & (slots - 1));
    const int64_t offset = (slot * layout.num_kv_heads + blockIdx.y) * layout.head_dim;
    write_mean<Element>(step, k, at, k_mean + offset);
    if (v_mean) write_mean<Element>(step, v, at, v_mean + offset);
  }
}

}  // namespace
}  // namespace compactattn

// which = 0: blocks that this step's tokens complete; 1: every whole block. k_mean, v_mean
// [num_pages * slots, num_kv_heads, head_dim]; v_mean may be null.
extern "C" __global__ void __launch_bounds__(128)
    compactattn_summaries_bf16(const __grid_constant__ compactattn::Step step, float* k_mean,
                               float* v_mean, int which) {
  compactattn::summarise<__nv_bfloat16>(step, k_mean, v_mean, which);
}

extern "C" __global__ void __launch_bounds__(128)
    compactattn_summaries_fp16(const __grid_constant__ compactattn::Step step, float* k_mean,
                               float* v_mean, int which) {
  compactattn::summarise<__half>(step, k_mean, v_mean, which);
}
