// summaries: the mean key (and value) of whole blocks, per KV head, under the page of the block's
// last token (rust/summaries.rs).
//
// Grid (writers + checkers, num_kv_heads) x 128. `writers` CTAs (any > 0) in x share the blocks to
// write whatever lies there, keys, values and seals each by a CTA of their own; as many for each of
// total_q / block_size + num_reqs blocks as a step completes at most, and none has a second. The
// CTAs after them compare the seals of all older blocks with their keys (rust/seals.rs), 16 blocks
// at a time, and write what differs. Launched after the KV write, before
// or without batch: lengths and pages are checked here, and what is out of range is skipped. Sums
// are f64 in a fixed order: of 8- and 16-bit elements they are exact but for bf16 that differ by
// more than 2^37, so a mean is the CPU's.
#include "../common/e4m3.cuh"
#include "../common/math.cuh"
#include "../params.h"

namespace compactattn {
namespace {

constexpr int kThreads = 128;
constexpr int kUnit = 8;  // elements of one load

// kOlder: those that neither this step's tokens complete nor `which` of the launch names.
enum Which : int { kCompleted = 0, kAll = 1, kOlder = 2 };

// Where a call's summaries go.
struct Means {
  float* k;
  float* v;         // may be null
  uint32_t* seals;  // [num_pages * slots, num_kv_heads, 2], low word first; may be null
};

// Whole blocks of one request: first .. first + count.
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
  const int older = past >> step.layout.log2_block_tokens;
  const int all = kv_len >> step.layout.log2_block_tokens;
  if (which == kOlder) return {0, older};
  return which == kAll ? Blocks{0, all} : Blocks{older, all - older};
}

// Consecutive blocks of a request.
struct Found {
  int req;  // -1: none
  int block;
  int count;
};

// Run `index` of all requests' blocks, cut into runs of at most `run`; by one warp, which looks at
// 32 requests at once.
__device__ Found find(const Step& step, int64_t index, int which, int run) {
  const int lane = threadIdx.x % 32;
  int64_t before = 0;
  for (int from = 0; from < step.batch.num_reqs; from += 32) {
    const int req = from + lane;
    const Blocks mine = req < step.batch.num_reqs ? blocks_of(step, req, which) : Blocks{0, 0};
    const int64_t runs = (mine.count + run - 1) / run;
    int64_t sum = runs;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    const uint32_t past = __ballot_sync(0xffffffffu, index < before + sum);
    const int64_t offset = (index - (before + sum - runs)) * run;
    const int owner = __ffs(past) - 1;
    if (past) {
      const int block = static_cast<int>(mine.first + offset);
      const int count = static_cast<int>(mine.count - offset);
      return {from + owner, __shfl_sync(0xffffffffu, block, owner),
              min(run, __shfl_sync(0xffffffffu, count, owner))};
    }
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  return {-1, 0, 0};
}

// One pool of the cache.
struct Pool {
  const void* base;
  float scale;  // of the CTA's KV head
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

// 8 elements, as they lie.
template <class Element>
__device__ __forceinline__ uint4 load_unit(const Element* at) {
  return __ldg(reinterpret_cast<const uint4*>(at));
}

__device__ __forceinline__ uint2 load_unit(const E4m3* at) {
  return __ldg(reinterpret_cast<const uint2*>(at));
}

template <class Element>
__device__ __forceinline__ void add(const uint4& words, double (&sums)[kUnit]) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<Element>(pairs[i]);
    sums[2 * i] += pair.x;
    sums[2 * i + 1] += pair.y;
  }
}

template <class Element>
__device__ __forceinline__ void add(const uint2& words, double (&sums)[kUnit]) {
  const uint32_t pairs[4] = {words.x, words.x >> 16, words.y, words.y >> 16};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(ptx::widen_pair(pairs[i]));
    sums[2 * i] += pair.x;
    sums[2 * i + 1] += pair.y;
  }
}

// Sums of 8 elements over every `lanes`-th token of the block, in the order of the tokens. Loads of
// several tokens are in flight at once: what a block takes is their latency.
template <class Element>
__device__ __forceinline__ void sum_tokens(const Step& step, const Pool& pool, const Found& at,
                                           int lanes, double (&sums)[kUnit]) {
  constexpr int kAtOnce = sizeof(Element) == 1 ? 2 : 8;  // of bytes more spill on some targets
  const Layout& layout = step.layout;
  const int units = layout.head_dim / kUnit, tokens = 1 << layout.log2_block_tokens;
  const int start = at.block << layout.log2_block_tokens;
  const int32_t* pages = step.batch.block_table + step.batch.table_stride * at.req;
  const Element* base = static_cast<const Element*>(pool.base) + blockIdx.y * pool.head_stride +
                        threadIdx.x % units * kUnit;
  for (int first = threadIdx.x / units; first < tokens; first += kAtOnce * lanes) {
    int64_t page[kAtOnce];
    decltype(load_unit(base)) words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = start + min(first + i * lanes, tokens - 1);
      page[i] = __ldg(pages + (token >> layout.log2_page_tokens));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = start + min(first + i * lanes, tokens - 1);
      const int in_page = token & ((1 << layout.log2_page_tokens) - 1);
      words[i] = load_unit(base + page[i] * pool.page_stride + in_page * pool.token_stride);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * lanes < tokens) add<Element>(words[i], sums);
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
    const double share = static_cast<double>(pool.scale) / (1 << layout.log2_block_tokens);
    mean[d] = static_cast<float>(sum * share);
  }
  __syncthreads();
}

// Whether every page of the block lies in the pool; called by the whole CTA.
__device__ bool has_pages(const Step& step, const Found& at) {
  const int32_t* pages = step.batch.block_table + step.batch.table_stride * at.req;
  const int start = at.block << step.layout.log2_block_tokens;
  const int last = start + (1 << step.layout.log2_block_tokens) - 1;
  const int log2_page = step.layout.log2_page_tokens;
  bool outside = false;
  for (int p = (start >> log2_page) + threadIdx.x; p <= last >> log2_page; p += kThreads) {
    outside |= pages[p] < 0 || pages[p] >= step.batch.num_pages;
  }
  return !__syncthreads_or(outside);
}

// Slot of a block's summary, under the page of its last token; the page is in the pool.
__device__ __forceinline__ int64_t slot_of(const Step& step, const Found& at) {
  const Layout& layout = step.layout;
  const int log2_slots = max(0, layout.log2_page_tokens - layout.log2_block_tokens);
  const int last = ((at.block + 1) << layout.log2_block_tokens) - 1;
  const int64_t page =
      step.batch.block_table[step.batch.table_stride * at.req + (last >> layout.log2_page_tokens)];
  return (page << log2_slots) + (at.block & ((1 << log2_slots) - 1));
}

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  constexpr uint64_t kMix = 0xd6e8feb86659fd93;
  x = (x ^ x >> 32) * kMix;
  x = (x ^ x >> 29) * kMix;
  return x ^ x >> 32;
}

// Seal of a block's keys of the CTA's KV head as they lie (rust/seals.rs, seal); 0 where a page is
// not in the pool. By kProbeLanes lanes side by side, their whole warp at once; `at.count` 0 reads
// nothing.
constexpr int kProbeLanes = 8;
template <class Element>
__device__ uint64_t seal_of(const Step& step, const Found& at, bool values) {
  const Batch& batch = step.batch;
  const Layout& layout = step.layout;
  const int32_t* pages = batch.block_table + batch.table_stride * at.req;
  const Element* base = static_cast<const Element*>(batch.k) + blockIdx.y * batch.k_head_stride;
  const int log2_probe_tokens = min(4, layout.log2_block_tokens);
  const int probes = at.count > 0 ? 1 << (layout.log2_block_tokens - log2_probe_tokens) : 0;
  uint64_t sum = 0;
  int outside = 0;
  for (int i = threadIdx.x % kProbeLanes; i < probes; i += kProbeLanes) {
    const int token = (at.block << layout.log2_block_tokens) + ((i + 1) << log2_probe_tokens) - 1;
    const int64_t page = pages[token >> layout.log2_page_tokens];
    if (page < 0 || page >= batch.num_pages) {
      outside = 1;
      break;
    }
    const int in_page = token & ((1 << layout.log2_page_tokens) - 1);
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(base + page * batch.k_page_stride +
                                                         in_page * batch.k_token_stride));
    const uint64_t low = x.x | static_cast<uint64_t>(x.y) << 32;
    const uint64_t high = x.z | static_cast<uint64_t>(x.w) << 32;
    sum ^= mix(mix(low ^ (i + 1) * 0x9e3779b97f4a7c15) + high);
  }
#pragma unroll
  for (int d = 1; d < kProbeLanes; d *= 2) {
    sum ^= __shfl_xor_sync(0xffffffffu, sum, d);
    outside |= __shfl_xor_sync(0xffffffffu, outside, d);
  }
  return outside ? 0 : (sum ^ (values ? 0xc2b2ae3d27d4eb4e : 0)) | 1;
}

// What is written of a block; a launch without values or seals has fewer parts.
enum Part : int { kKeys = 0, kValues = 1, kSeal = 2 };

__device__ int parts_of(const Means& means) {
  return 1 + (means.v != nullptr) + (means.seals != nullptr);
}

__device__ Part part_at(const Means& means, int index) {
  if (index == 0) return kKeys;
  return index == 1 && means.v ? kValues : kSeal;
}

// Writes one part of a block whose pages are in the pool; called by the whole CTA.
template <class Element>
__device__ __forceinline__ void write_part(const Step& step, const Means& means, const Found& at,
                                           Part part) {
  const Batch& batch = step.batch;
  const int head = blockIdx.y;
  const int64_t row = slot_of(step, at) * step.layout.num_kv_heads + head;
  if (part != kSeal) {
    const bool keys = part == kKeys;
    const Pool pool = keys ? Pool{batch.k, key_scale(batch, head), batch.k_page_stride,
                                  batch.k_token_stride, batch.k_head_stride}
                           : Pool{batch.v, value_scale(batch, head), batch.v_page_stride,
                                  batch.v_token_stride, batch.v_head_stride};
    float* mean = (keys ? means.k : means.v) + row * step.layout.head_dim;
    return write_mean<Element>(step, pool, at, mean);
  }
  if (threadIdx.x >= 32) return;
  const uint64_t seal = seal_of<Element>(step, at, means.v);
  if (threadIdx.x == 0) {
    means.seals[2 * row] = static_cast<uint32_t>(seal);
    means.seals[2 * row + 1] = static_cast<uint32_t>(seal >> 32);
  }
}

// Writes one block's summary and seal; called by the whole CTA.
template <class Element>
__device__ void write_block(const Step& step, const Means& means, const Found& at) {
  if (!has_pages(step, at)) return;
  for (int i = 0; i < parts_of(means); ++i) {
    write_part<Element>(step, means, at, part_at(means, i));
  }
}

// Blocks of a run whose summaries are of other keys than lie there, one bit each; called by the
// whole CTA. Blocks with a page outside the pool are none of them.
constexpr int kRun = kThreads / kProbeLanes;
template <class Element>
__device__ uint32_t broken_seals(const Step& step, const Means& means, const Found& run) {
  __shared__ uint32_t broken[kThreads / 32];
  const int index = static_cast<int>(threadIdx.x) / kProbeLanes;
  const Found at{run.req, run.block + index, index < run.count ? 1 : 0};
  const uint64_t now = seal_of<Element>(step, at, means.v);
  bool is_broken = false;
  if (at.count > 0 && now != 0 && threadIdx.x % kProbeLanes == 0) {
    const int64_t row = slot_of(step, at) * step.layout.num_kv_heads + blockIdx.y;
    const uint2 kept = *reinterpret_cast<const uint2*>(means.seals + 2 * row);
    is_broken = now != (kept.x | static_cast<uint64_t>(kept.y) << 32);
  }
  const uint32_t votes = __ballot_sync(0xffffffffu, is_broken);
  if (threadIdx.x % 32 == 0) {
    uint32_t mine = 0;
    for (int i = 0; i < 32 / kProbeLanes; ++i) mine |= (votes >> i * kProbeLanes & 1) << i;
    broken[threadIdx.x / 32] = mine << threadIdx.x / kProbeLanes;
  }
  __syncthreads();
  uint32_t all = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) all |= broken[warp];
  __syncthreads();
  return all;
}

template <class Element>
__device__ __forceinline__ void summarise(const Step& step, const Means& means, int which,
                                          int writers) {
  if (static_cast<int>(blockIdx.x) < writers) {
    const int parts = parts_of(means);
    for (int64_t i = blockIdx.x;; i += writers) {
      const Found at = find(step, i / parts, which, 1);
      if (at.req < 0) return;
      if (!has_pages(step, at)) continue;
      write_part<Element>(step, means, at, part_at(means, static_cast<int>(i % parts)));
    }
  }
  for (int64_t i = static_cast<int>(blockIdx.x) - writers;; i += gridDim.x - writers) {
    const Found run = find(step, i, kOlder, kRun);
    if (run.req < 0) return;
    for (uint32_t left = broken_seals<Element>(step, means, run); left; left &= left - 1) {
      write_block<Element>(step, means, {run.req, run.block + __ffs(left) - 1, 1});
    }
  }
}

}  // namespace
}  // namespace compactattn

// which = 0: blocks that this step's tokens complete; 1: every whole block. k_mean, v_mean
// [num_pages * slots, num_kv_heads, head_dim]; v_mean and seals may be null, without seals every
// CTA is a writer.
extern "C" __global__ void __launch_bounds__(128)
    compactattn_summaries_bf16(const __grid_constant__ compactattn::Step step, float* k_mean,
                               float* v_mean, uint32_t* seals, int which, int writers) {
  compactattn::summarise<__nv_bfloat16>(step, {k_mean, v_mean, seals}, which, writers);
}

extern "C" __global__ void __launch_bounds__(128)
    compactattn_summaries_fp16(const __grid_constant__ compactattn::Step step, float* k_mean,
                               float* v_mean, uint32_t* seals, int which, int writers) {
  compactattn::summarise<__half>(step, {k_mean, v_mean, seals}, which, writers);
}

extern "C" __global__ void __launch_bounds__(128)
    compactattn_summaries_e4m3(const __grid_constant__ compactattn::Step step, float* k_mean,
                               float* v_mean, uint32_t* seals, int which, int writers) {
  compactattn::summarise<compactattn::E4m3>(step, {k_mean, v_mean, seals}, which, writers);
}
