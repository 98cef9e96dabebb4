// select, flashprefill: all rows of a span against mean keys, relative to the span's best block
// (arXiv 2603.06199; rust/select/flashprefill.rs).
//
// Two kernels. The first leaves L_j = log2 of the summed weights of block j in the scores and the
// largest L of each 32 blocks, open ones too, in `cells`; the second turns them into scores.
#include "tiles.cuh"

namespace compactattn {
namespace {

// M: blocks, 32 a warp. N: query rows of one head.
constexpr int kThreads = 128;
constexpr int kBlocks = 128;
constexpr int kRows = 64;
constexpr int kWarpBlocks = 32;

// Numbers in `cells` per (span, query head).
__device__ __forceinline__ int peaks_stride(const Step& step) {
  return (step.layout.max_blocks + kBlocks - 1) / kBlocks * (kBlocks / kWarpBlocks);
}

__device__ __forceinline__ float* peaks_of(const Step& step, int span, int q_head) {
  const int64_t row = static_cast<int64_t>(span) * step.layout.num_q_heads + q_head;
  return step.stages.cells + row * peaks_stride(step);
}

// Blocks that the maximum runs over.
__device__ __forceinline__ int blocks_of(const Step& step, const Span& span) {
  return step.settings.relative_to_past ? past_blocks_of(step, span)
                                        : span.kv_end >> step.layout.log2_block_tokens;
}

// Mean of a whole block, kept under the page of its last token.
__device__ __forceinline__ const float* mean_key(const Step& step, int req, int kv_head,
                                                 int block) {
  const Layout& layout = step.layout;
  const int log2_slots = max(0, layout.log2_page_tokens - layout.log2_block_tokens);
  const int page = page_of(step, req, ((block + 1) << layout.log2_block_tokens) - 1);
  const int64_t slot =
      (static_cast<int64_t>(page) << log2_slots) + (block & ((1 << log2_slots) - 1));
  return step.stages.k_mean + (slot * layout.num_kv_heads + kv_head) * layout.head_dim;
}

// One CTA's share: blocks `first` .. `end` of a span's request for the heads of one KV head.
struct Tile {
  Span span;
  int span_index;
  int kv_head;
  int first;
  int end;
  int row_bytes;
};

// Means as a sum of two 16-bit numbers: off by 2^-16 of themselves at most.
template <class Element>
__device__ void load_means(const Step& step, const Tile& tile, uint8_t* high, uint8_t* low) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 8
  for (int row = warp; row < kBlocks; row += kThreads / 32) {
    const bool valid = tile.first + row < tile.end;
    const float* mean =
        valid ? mean_key(step, tile.span.req, tile.kv_head, tile.first + row) : nullptr;
    for (int x = lane * 4; x < step.layout.head_dim; x += 128) {
      const float4 value = valid ? *reinterpret_cast<const float4*>(mean + x) : float4{};
      const float parts[4] = {value.x, value.y, value.z, value.w};
      Element top[4], rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        top[i] = Element(parts[i]);
        rest[i] = Element(isfinite(parts[i]) ? parts[i] - float(top[i]) : 0.f);
      }
      *reinterpret_cast<uint2*>(high + row * tile.row_bytes + 2 * x) =
          reinterpret_cast<const uint2&>(top);
      *reinterpret_cast<uint2*>(low + row * tile.row_bytes + 2 * x) =
          reinterpret_cast<const uint2&>(rest);
    }
  }
}

// Starts the copy of kRows query rows from row `first` of the span on.
template <class Element>
__device__ void load_rows(const Step& step, const Tile& tile, int head, int first, uint32_t to) {
  const int pieces = step.layout.head_dim / 8;
  const Element* base = query_at<Element>(step, tile.span.q_start, head);
  for (int i = threadIdx.x; i < kRows * pieces; i += kThreads) {
    const int row = i / pieces, piece = i % pieces;
    const bool valid = first + row < tile.span.len;
    const Element* from =
        base + (valid ? (first + row) * step.batch.q_token_stride + piece * 8 : 0);
    ptx::copy_async(to + row * tile.row_bytes + piece * 16, from, valid);
  }
  ptx::copy_async_commit();
}

using Logits = float[2][kRows / 8][4];

// Logits of the warp's blocks and kRows rows, before the scale.
template <class Element>
__device__ void multiply_tile(Logits& c, uint32_t high, uint32_t low, uint32_t rows, int head_dim,
                              int row_bytes) {
  const int lane = threadIdx.x % 32;
  const uint32_t a = offset_a(lane, row_bytes), b = rows + offset_b(lane, row_bytes);
  for (int x = 0; x < head_dim; x += 16) {
    uint32_t columns[kRows / 16][4];
    load_b(columns, b + 2 * x, row_bytes);
    multiply_32<Element>(c, high + a + 2 * x, row_bytes, columns);
    multiply_32<Element>(c, low + a + 2 * x, row_bytes, columns);
  }
}

// Hides what a row does not see whole: rows below need(block), and those past the span.
__device__ void hide(const Step& step, const Tile& tile, int first_row, Logits& c) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const int block = tile.first + warp * kWarpBlocks + half * 8 + lane / 4;
    const int need = ((block + 1) << step.layout.log2_block_tokens) - visible_to(tile.span, 0);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int row = first_row + i / 2 * 8 + lane % 4 * 2 + i % 2;
      float& x = c[half / 2][i / 2][half % 2 * 2 + i % 2];
      if (row < need || row >= tile.span.len) x = -kInfinity;
    }
  }
}

// Adds the weights of the thread's logits of each of its four blocks.
__device__ void fold(LogSum (&sums)[4], const Logits& c, float scale) {
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    float most = -FLT_MAX;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const float* x = &c[half / 2][n][half % 2 * 2];
      most = fmaxf(most, fmaxf(x[0], x[1]));
    }
    LogSum tile{fmaxf(most * scale, -FLT_MAX), 0.f};
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const float* x = &c[half / 2][n][half % 2 * 2];
      tile.sum += ptx::exp2_approx(fmaf(x[0], scale, -tile.max)) +
                  ptx::exp2_approx(fmaf(x[1], scale, -tile.max));
    }
    sums[half].merge(tile);
  }
}

// Writes one head's L and their maximum over the warp's blocks; NaN has no say in the maximum.
__device__ void finish(const Step& step, const Tile& tile, int head, const LogSum (&sums)[4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int past = past_blocks_of(step, tile.span);
  float* scores = scores_of(step, tile.span_index, head);
  float best = -FLT_MAX;
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    LogSum sum = sums[half];
    sum.merge(sum.of_lane(1));
    sum.merge(sum.of_lane(2));
    const int block = tile.first + warp * kWarpBlocks + half * 8 + lane / 4;
    const float value = sum.log2();
    if (block < tile.end) best = fmaxf(best, value);
    if (block < past && lane % 4 == 0) scores[block] = value;
  }
  best = warp_reduce(best, [](float a, float b) { return fmaxf(a, b); });
  if (lane == 0) {
    peaks_of(step, tile.span_index, head)[tile.first / kWarpBlocks + warp] = best;
  }
}

// Without means nothing can be judged.
__device__ void give_up(const Step& step, const Tile& tile, int group) {
  const int past = min(past_blocks_of(step, tile.span), tile.first + kBlocks);
  for (int head = tile.kv_head * group; head < (tile.kv_head + 1) * group; ++head) {
    float* scores = scores_of(step, tile.span_index, head);
    for (int j = tile.first + threadIdx.x; j < past; j += kThreads)
      scores[j] = __int_as_float(0x7fc00000);
  }
}

template <class Element>
__device__ void sum_weights(const Step& step) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Layout& layout = step.layout;
  Tile tile;
  tile.span_index = blockIdx.z;
  if (!load_span(step, tile.span_index, tile.span)) return;
  tile.kv_head = blockIdx.y;
  tile.first = blockIdx.x * kBlocks;
  tile.end = blocks_of(step, tile.span);
  tile.row_bytes = 2 * layout.head_dim + kPadBytes;
  if (tile.first >= tile.end) return;
  const int group = layout.group_size;
  if (!step.stages.k_mean) return give_up(step, tile, group);

  uint8_t *high = shared, *low = shared + kBlocks * tile.row_bytes;
  const uint32_t rows = ptx::shared_address(low + kBlocks * tile.row_bytes);
  const uint32_t warp_rows = threadIdx.x / 32 * kWarpBlocks * tile.row_bytes;
  const int tiles = (tile.span.len + kRows - 1) / kRows, head = tile.kv_head * group;
  const float scale = layout.sm_scale * kLog2E;
  load_rows<Element>(step, tile, head, 0, rows);
  load_means<Element>(step, tile, high, low);
  LogSum sums[4];
  for (int i = 0; i < tiles * group; ++i) {
    const int next = i + 1, first = i % tiles * kRows;
    if (next < tiles * group) {
      load_rows<Element>(step, tile, head + next / tiles, next % tiles * kRows,
                         rows + next % 2 * kRows * tile.row_bytes);
      ptx::copy_async_wait<1>();
    } else {
      ptx::copy_async_wait<0>();
    }
    __syncthreads();
    Logits c = {};
    multiply_tile<Element>(c, ptx::shared_address(high) + warp_rows,
                           ptx::shared_address(low) + warp_rows,
                           rows + i % 2 * kRows * tile.row_bytes, layout.head_dim, tile.row_bytes);
    const bool all_past = tile.first + kBlocks <= past_blocks_of(step, tile.span);
    if (!all_past || first + kRows > tile.span.len) hide(step, tile, first, c);
    fold(sums, c, scale);
    if (next % tiles == 0) {
      finish(step, tile, head + i / tiles, sums);
#pragma unroll
      for (LogSum& sum : sums) sum = LogSum{};
    }
    __syncthreads();  // the rows may be overwritten
  }
}

}  // namespace
}  // namespace compactattn

// Grid: (ceil(max_blocks / 128), num_kv_heads, max_select_spans) x 128; dynamic shared memory
// 384 * (2 * head_dim + 16) bytes. `cells`: [max_select_spans, num_q_heads,
// 4 * ceil(max_blocks / 128)].
extern "C" __global__ void __launch_bounds__(128, 2)
    compactattn_flashprefill_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::sum_weights<__nv_bfloat16>(step);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    compactattn_flashprefill_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::sum_weights<__half>(step);
}

// After either. Grid: (max_select_spans, num_q_heads) x 256.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_flashprefill_relate(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  Span span;
  if (!step.stages.k_mean || !load_span(step, blockIdx.x, span)) return;
  const int peaks = (blocks_of(step, span) + kWarpBlocks - 1) / kWarpBlocks;
  const float* peak = peaks_of(step, blockIdx.x, blockIdx.y);
  float best = -FLT_MAX;
  for (int i = threadIdx.x % 32; i < peaks; i += 32) best = fmaxf(best, peak[i]);
  best = warp_reduce(best, [](float a, float b) { return fmaxf(a, b); });
  float* scores = scores_of(step, blockIdx.x, blockIdx.y);
  const int past = past_blocks_of(step, span);
  for (int j = threadIdx.x; j < past; j += 256) scores[j] = ptx::exp2_approx(scores[j] - best);
}
