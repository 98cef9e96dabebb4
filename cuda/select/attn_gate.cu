// select, attn_gate: a learned gate scores pooled queries against pooled keys (SeerAttention, arXiv
// 2410.13276; rust/select/attn_gate.rs).
//
// Two kernels. The first pools and projects every whole block of the requests that are not dense
// into `cells`; the second makes a span's gate queries, and scores by a softmax over the blocks
// that the span's last token sees.
#include "../common/shared.h"
#include "../ptx/grid.cuh"
#include "gate.h"
#include "tiles.cuh"
#include "turn.cuh"

namespace compactattn {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 16;  // pooled together, so that weights are read once for so many
static_assert(kBlocks * 3 * 64 * sizeof(float) == gate_keys_bytes(64), "a launch's");
// At a time, so that latencies overlap: keys of one thread, dot products of one warp.
constexpr int kLoads = 8;
constexpr int kDots = 8;

// Gate keys of one block: [k_heads, gate_dim].
__device__ __forceinline__ float* gate_keys(const Step& step, const Gate& gate, int req,
                                            int block) {
  const int64_t row = static_cast<int64_t>(req) * step.layout.max_blocks + block;
  return step.stages.cells + row * gate.k_heads * gate.gate_dim;
}

// Elements of pair `i` of a vector of `dim`.
__device__ __forceinline__ int2 pair_of(const Gate& gate, int i, int dim) {
  return gate.interleaved ? int2{2 * i, 2 * i + 1} : int2{i, i + dim / 2};
}

// A pair of a rotated head vector as it was before the rotation by `angle`.
__device__ __forceinline__ float2 unrotated(const Gate& gate, float2 x, float angle) {
  const Turn turn = turn_by(angle);
  const float cos = turn.cos / gate.rope_scale, sin = turn.sin / -gate.rope_scale;
  return {x.x * cos - x.y * sin, x.y * cos + x.x * sin};
}

template <class Element>
__device__ __forceinline__ float2 load_pair(const Element* x, int2 pair) {
  return {float(x[pair.x]), float(x[pair.y])};
}

// Rotates `count` gate vectors `[count, gate_dim]`; all threads of the CTA.
__device__ void rotate(const Gate& gate, int position, int count, float* x) {
  const int half = gate.gate_dim / 2;
  for (int i = threadIdx.x; i < count * half; i += kThreads) {
    const int2 pair = pair_of(gate, i % half, gate.gate_dim);
    float* vector = x + i / half * gate.gate_dim;
    const Turn turn = turn_by(static_cast<float>(position) * gate.gate_inv_freq[i % half]);
    const float cos = turn.cos * gate.rope_scale, sin = turn.sin * gate.rope_scale;
    const float a = vector[pair.x], b = vector[pair.y];
    vector[pair.x] = a * cos - b * sin;
    vector[pair.y] = b * cos + a * sin;
  }
  __syncthreads();
}

// Threads that share a loop: this one's index among them, and how many they are.
struct Team {
  int index;
  int size;
};

// Max, min and mean, one after the other, of the keys of tokens `begin` .. `end` before their
// rotation; `into [3 * head_dim]`. `head`: request and KV head. A thread a pair.
template <class Element>
__device__ void pool_keys(const Step& step, const Gate& gate, Team team, int2 head, int2 tokens,
                          float* into) {
  const int dim = step.layout.head_dim;
  const float share = 1.f / (tokens.y - tokens.x);
  for (int i = team.index; i < dim / 2; i += team.size) {
    const int2 pair = pair_of(gate, i, dim);
    const float freq = gate.inv_freq[i];
    float2 most{-kInfinity, -kInfinity}, least{kInfinity, kInfinity}, mean{0.f, 0.f};
    for (int first = tokens.x; first < tokens.y; first += kLoads) {
      float2 keys[kLoads];
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        const int t = min(first + n, tokens.y - 1);
        keys[n] = load_pair(key_at<Element>(step, head.x, head.y, t), pair);
      }
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        if (first + n >= tokens.y) continue;
        const float2 x = unrotated(gate, keys[n], static_cast<float>(first + n) * freq);
        most = {fmaxf(most.x, x.x), fmaxf(most.y, x.y)};
        least = {fminf(least.x, x.x), fminf(least.y, x.y)};
        mean = {fmaf(x.x, share, mean.x), fmaf(x.y, share, mean.y)};
      }
    }
    into[pair.x] = most.x, into[pair.y] = most.y;
    into[dim + pair.x] = least.x, into[dim + pair.y] = least.y;
    into[2 * dim + pair.x] = mean.x, into[2 * dim + pair.y] = mean.y;
  }
}

// Rows of features, and where a row of the result starts.
struct Rows {
  const float* x;  // [count, inputs]; readable up to a multiple of kTaskRows rows, 16-byte aligned
  int count;
  int inputs;  // a multiple of 4
  float* out;
  int64_t out_stride;
};

constexpr int kTaskRows = 8;
static_assert(kBlocks % kTaskRows == 0, "whole tasks");

// x . w [inputs, gate_dim]; all threads of the CTA, each kRows rows of one column at a time.
template <int kRows>
__device__ void project(const Rows& rows, const float* w, int gate_dim) {
  const int tasks = (rows.count + kRows - 1) / kRows * gate_dim;
  for (int task = threadIdx.x; task < tasks; task += kThreads) {
    const int column = task % gate_dim, first = task / gate_dim * kRows;
    const float* x = rows.x + first * rows.inputs;
    float sums[kRows] = {};
#pragma unroll 2
    for (int i = 0; i < rows.inputs; i += 4) {
      float weights[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        weights[n] = __ldg(w + static_cast<int64_t>(i + n) * gate_dim + column);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(x + r * rows.inputs + i);
        sums[r] = fmaf(four.x, weights[0], sums[r]);
        sums[r] = fmaf(four.y, weights[1], sums[r]);
        sums[r] = fmaf(four.z, weights[2], sums[r]);
        sums[r] = fmaf(four.w, weights[3], sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r < rows.count) rows.out[(first + r) * rows.out_stride + column] = sums[r];
    }
  }
}

// Gate keys of kBlocks blocks of one request and KV head.
template <class Element>
__device__ void make_keys(const Step& step, const Gate& gate) {
  extern __shared__ __align__(16) float features[];  // [kBlocks, 3 * head_dim]
  const Layout& layout = step.layout;
  Span span;
  if (!load_span(step, blockIdx.z, span) || span.first > 0) return;
  const int log2_block = layout.log2_block_tokens;
  const int end = step.stages.requests[span.req].kv_len >> log2_block;
  const int first = blockIdx.x * kBlocks, inputs = 3 * layout.head_dim;
  if (first >= end) return;
  const int blocks = min(kBlocks, end - first);
  for (int i = threadIdx.x / 32; i < kBlocks; i += kThreads / 32) {
    float* into = features + i * inputs;
    if (i < blocks) {
      const int2 tokens{(first + i) << log2_block, (first + i + 1) << log2_block};
      const Team warp{static_cast<int>(threadIdx.x % 32), 32};
      pool_keys<Element>(step, gate, warp, {span.req, static_cast<int>(blockIdx.y)}, tokens, into);
    } else {
      for (int x = threadIdx.x % 32; x < inputs; x += 32) into[x] = 0.f;
    }
  }
  __syncthreads();
  const int heads = gate.k_heads / layout.num_kv_heads;
  const int64_t stride = static_cast<int64_t>(gate.k_heads) * gate.gate_dim;
  for (int h = 0; h < heads; ++h) {
    const int head = blockIdx.y * heads + h;
    const float* weights = gate.k + static_cast<int64_t>(head) * inputs * gate.gate_dim;
    float* out = gate_keys(step, gate, span.req, first) + head * gate.gate_dim;
    project<kTaskRows>({features, blocks, inputs, out, stride}, weights, gate.gate_dim);
  }
  __syncthreads();
  for (int i = 0; i < blocks; ++i) {
    float* row = gate_keys(step, gate, span.req, first + i);
    rotate(gate, (first + i) << log2_block, heads, row + blockIdx.y * heads * gate.gate_dim);
  }
}

// Means of the span's queries before their rotation, `[heads, head_dim]`; a warp a head and 4
// pairs, its lanes 8 parts of the rows.
template <class Element>
__device__ void mean_queries(const Step& step, const Gate& gate, const Span& span, int2 heads,
                             float* means) {
  const int dim = step.layout.head_dim, position = visible_to(span, 0) - 1;
  const int part = threadIdx.x % 8;
  for (int i = threadIdx.x / 8; i < heads.y * dim / 2; i += kThreads / 8) {
    const int head = i / (dim / 2), at = i % (dim / 2);
    const int2 pair = pair_of(gate, at, dim);
    const float freq = gate.inv_freq[at], share = 1.f / span.len;
    float2 mean{0.f, 0.f};
#pragma unroll 4
    for (int row = part; row < span.len; row += 8) {
      const Element* query = query_at<Element>(step, span.q_start + row, heads.x + head);
      const float angle = static_cast<float>(position + row) * freq;
      const float2 x = unrotated(gate, load_pair(query, pair), angle);
      mean = {fmaf(x.x, share, mean.x), fmaf(x.y, share, mean.y)};
    }
#pragma unroll
    for (int mask = 4; mask > 0; mask /= 2) {
      mean.x += __shfl_xor_sync(0xffffffffu, mean.x, mask);
      mean.y += __shfl_xor_sync(0xffffffffu, mean.y, mask);
    }
    if (part == 0) means[head * dim + pair.x] = mean.x, means[head * dim + pair.y] = mean.y;
  }
  __syncthreads();
}

// Sum over the CTA's warps in their order.
__device__ LogSum merge_warps(LogSum sum) {
  __shared__ LogSum warps[kThreads / 32];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum.merge(sum.of_lane(mask));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  LogSum all;
  for (const LogSum& warp : warps) all.merge(warp);
  return all;
}

struct Vectors {
  const float* query;
  const float* edge;  // of the block that the span's last token sees in part; may be null
  int key_head;
};

// Softmax over the blocks that the span's last token sees; the past ones' shares into `heads` rows
// of scores from query head `first_head` on.
__device__ void softmax(const Step& step, const Gate& gate, const Span& span, const Vectors& x,
                        int2 heads) {
  const int whole = span.kv_end >> step.layout.log2_block_tokens;
  const int past = past_blocks_of(step, span), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = kLog2E / sqrtf(static_cast<float>(gate.gate_dim));
  float* scores = scores_of(step, blockIdx.x, heads.x);
  const int blocks = whole + (x.edge != nullptr);
  LogSum sum;
  for (int first = warp * kDots; first < blocks; first += kThreads / 32 * kDots) {
    float dots[kDots] = {};
    for (int i = lane; i < gate.gate_dim; i += 32) {
#pragma unroll
      for (int n = 0; n < kDots; ++n) {
        const int j = min(first + n, blocks - 1);
        const float* key =
            j < whole ? gate_keys(step, gate, span.req, j) + x.key_head * gate.gate_dim : x.edge;
        dots[n] = fmaf(x.query[i], key[i], dots[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kDots; ++n) {
      const float logit = scale * warp_sum(dots[n]);
      if (lane == 0 && first + n < blocks) sum.add(logit);
      if (lane == 0 && first + n < past) scores[first + n] = logit;
    }
  }
  const LogSum all = merge_warps(sum);  // and the barrier before others read the logits
  for (int j = threadIdx.x; j < past; j += kThreads) {
    const float score = clamp_unit(ptx::exp2_approx(scores[j] - all.max) / all.sum);
    for (int h = 0; h < heads.y; ++h) scores_of(step, blockIdx.x, heads.x + h)[j] = score;
  }
}

template <class Element>
__device__ void score_span(const Step& step, const Gate& gate) {
  // Means [group or 1, head_dim], features [3 * head_dim], query and edge [gate_dim] each.
  extern __shared__ __align__(16) float shared[];
  const Layout& layout = step.layout;
  const int group = layout.group_size, dim = layout.head_dim, head = blockIdx.y;
  Span span;
  if (!load_span(step, blockIdx.x, span)) return;
  const int heads = gate.by_group ? group : 1;
  if (head % heads) return;  // the group's first head serves all
  float *means = shared, *features = means + heads * dim, *query = features + 3 * dim;
  float* edge = query + gate.gate_dim;

  const int kv_head = head / group, key_heads = gate.k_heads / layout.num_kv_heads;
  const int key_head = key_heads == 1 ? kv_head : head;
  mean_queries<Element>(step, gate, span, {head, heads}, means);
  if (gate.q) {
    const int inputs = heads * dim, matrix = gate.by_group ? kv_head : head;
    const float* weights = gate.q + static_cast<int64_t>(matrix) * inputs * gate.gate_dim;
    project<1>({means, 1, inputs, query, 0}, weights, gate.gate_dim);
  } else {
    for (int i = threadIdx.x; i < dim; i += kThreads) query[i] = means[i];
  }
  __syncthreads();
  rotate(gate, visible_to(span, 0) - 1, 1, query);

  const int whole = span.kv_end >> layout.log2_block_tokens << layout.log2_block_tokens;
  const bool cut = span.kv_end > whole;
  if (cut) {
    const Team all{static_cast<int>(threadIdx.x), kThreads};
    pool_keys<Element>(step, gate, all, {span.req, kv_head}, {whole, span.kv_end}, features);
    __syncthreads();
    const float* weights = gate.k + static_cast<int64_t>(key_head) * 3 * dim * gate.gate_dim;
    project<1>({features, 1, 3 * dim, edge, 0}, weights, gate.gate_dim);
    __syncthreads();
    rotate(gate, whole, 1, edge);
  }
  softmax(step, gate, span, {query, cut ? edge : nullptr, key_head}, {head, heads});
}

}  // namespace
}  // namespace compactattn

// Grid: (ceil(max_blocks / 16), num_kv_heads, max_select_spans) x 256; dynamic shared memory
// `gate_keys_bytes`. `cells`: [num_reqs, max_blocks, k_heads, gate_dim].
extern "C" __global__ void __launch_bounds__(256, 2)
    compactattn_attn_gate_keys_bf16(const __grid_constant__ compactattn::Step step,
                                    const __grid_constant__ compactattn::Gate gate) {
  compactattn::ptx::wait_for_earlier();
  compactattn::make_keys<__nv_bfloat16>(step, gate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    compactattn_attn_gate_keys_fp16(const __grid_constant__ compactattn::Step step,
                                    const __grid_constant__ compactattn::Gate gate) {
  compactattn::ptx::wait_for_earlier();
  compactattn::make_keys<__half>(step, gate);
}

// After the kernel of the same type. Grid: (max_select_spans, num_q_heads) x 256; dynamic shared
// memory `gate_bytes` of the group's heads under `by_group`, else of one.
extern "C" __global__ void __launch_bounds__(256, 2)
    compactattn_attn_gate_bf16(const __grid_constant__ compactattn::Step step,
                               const __grid_constant__ compactattn::Gate gate) {
  compactattn::ptx::wait_for_earlier();
  compactattn::score_span<__nv_bfloat16>(step, gate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    compactattn_attn_gate_fp16(const __grid_constant__ compactattn::Step step,
                               const __grid_constant__ compactattn::Gate gate) {
  compactattn::ptx::wait_for_earlier();
  compactattn::score_span<__half>(step, gate);
}
