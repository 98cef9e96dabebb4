// select, flashprefill: all rows of a span against mean keys, relative to the span's best block
// (arXiv 2603.06199; rust/select/flashprefill.rs).
//
// Two kernels. The first leaves L_j = log2 of the summed weights of block j in the scores and the
// largest L of each 16 blocks, open ones too, in `cells`; the second turns them into scores.
#include "../common/shared.h"
#include "../ptx/grid.cuh"
#include "flashprefill.cuh"

namespace compactattn {
namespace {

// M: blocks, 32 a warp. N: query rows of one head.
constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kWarpBlocks = 32;
static_assert((kBlocks + 2 * kRows) * row_bytes(64) == flashprefill_bytes(64), "a launch's");

// The warp's kWarpBlocks means in the queries' dtype, zeros past the last block. A lane looks up
// one block's slot, and eight loads are on their way at a time: their latency is not hidden
// otherwise.
template <class Element>
__device__ void load_means(const Step& step, const Tile& tile, uint8_t* to) {
  constexpr int kAtOnce = 8;
  const int first = threadIdx.x / 32 * kWarpBlocks, lane = threadIdx.x % 32;
  const int block = tile.first + first + lane;
  const int slot = block < tile.end ? mean_slot(step, tile.span.req, block) : -1;
  const int64_t heads = step.layout.num_kv_heads, dim = step.layout.head_dim;
  for (int x = lane * 4; x < (dim + 127) / 128 * 128; x += 128) {
    for (int row = 0; row < kWarpBlocks; row += kAtOnce) {
      float4 means[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t from = __shfl_sync(0xffffffffu, slot, row + i);
        const float* mean = step.stages.k_mean + (from * heads + tile.kv_head) * dim + x;
        means[i] = float4{};
        if (from >= 0 && x < dim) means[i] = __ldg(reinterpret_cast<const float4*>(mean));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (x >= dim) continue;
        *reinterpret_cast<uint2*>(to + (first + row + i) * tile.row_bytes + 2 * x) = uint2{
            pack_pair<Element>(means[i].x, means[i].y), pack_pair<Element>(means[i].z, means[i].w)};
      }
    }
  }
}

// Starts the copy of kRows query rows from row `first` of the span on; four threads a row.
template <class Element>
__device__ void load_rows(const Step& step, const Tile& tile, int head, int first, uint32_t to) {
  const int pieces = step.layout.head_dim / 8, piece = threadIdx.x % 4;
#pragma unroll
  for (int row = threadIdx.x / 4; row < kRows; row += kThreads / 4) {
    const bool valid = first + row < tile.span.len;
    const int token = tile.span.q_start + (valid ? first + row : 0);
    const Element* from = query_at<Element>(step, token, head);
    for (int i = piece; i < pieces; i += 4) {
      ptx::copy_async_alone(to + row * tile.row_bytes + i * 16, from + i * 8, valid);
    }
  }
  ptx::commit_copies();
}

using Logits = float[2][kRows / 8][4];

// Logits of the warp's blocks and kRows rows, before the scale. Unrolled, so that loads run ahead
// of the products.
template <class Element, int kDim>
__device__ __forceinline__ void multiply_dim(Logits& c, uint32_t means, uint32_t rows) {
  constexpr int kRowBytes = 2 * kDim + kPadBytes;
  const int lane = threadIdx.x % 32;
  const uint32_t a = offset_a(lane, kRowBytes), b = rows + offset_b(lane, kRowBytes);
#pragma unroll
  for (int x = 0; x < kDim; x += 16) {
    uint32_t columns[kRows / 16][4];
    load_b(columns, b + 2 * x, kRowBytes);
    multiply_32<Element>(c, means + a + 2 * x, kRowBytes, columns);
  }
}

template <class Element>
__device__ void multiply_tile(Logits& c, uint32_t means, uint32_t rows, int head_dim) {
  switch (head_dim) {
    case 64:
      return multiply_dim<Element, 64>(c, means, rows);
    case 96:
      return multiply_dim<Element, 96>(c, means, rows);
    case 128:
      return multiply_dim<Element, 128>(c, means, rows);
    default:
      return multiply_dim<Element, 256>(c, means, rows);
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

// Writes one head's L and their maximum over the warp's blocks, in which NaN has no say; starts the
// sums anew.
__device__ void finish(const Step& step, const Tile& tile, int head, LogSum (&sums)[4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int past = past_blocks_of(step, tile.span);
  float* scores = scores_of(step, tile.span_index, head);
  float best = -FLT_MAX;
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    LogSum sum = sums[half];
    sums[half] = LogSum{};
    sum.merge(sum.of_lane(1));
    sum.merge(sum.of_lane(2));
    const int block = tile.first + warp * kWarpBlocks + half * 8 + lane / 4;
    const float value = sum.log2();
    if (block < tile.end) best = fmaxf(best, value);
    if (block < past && lane % 4 == 0) scores[block] = value;
  }
  best = warp_reduce(best, [](float a, float b) { return fmaxf(a, b); });
  constexpr int kPeaks = kWarpBlocks / kPeakBlocks;  // the same one each
  if (lane < kPeaks) {
    peaks_of(step, tile.span_index, head)[tile.first / kPeakBlocks + warp * kPeaks + lane] = best;
  }
}

template <class Element>
__device__ void sum_weights(const Step& step) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Layout& layout = step.layout;
  Tile tile;
  tile.span_index = blockIdx.x;
  if (!load_span(step, tile.span_index, tile.span)) return;
  tile.kv_head = blockIdx.y;
  tile.first = blockIdx.z * kBlocks;
  tile.end = blocks_of(step, tile.span);
  tile.row_bytes = row_bytes(layout.head_dim);
  if (tile.first >= tile.end) return;
  const int group = layout.group_size;
  if (!step.stages.k_mean) return give_up(step, tile, group);

  const uint32_t rows = ptx::shared_address(shared) + kBlocks * tile.row_bytes;
  const int warp = threadIdx.x / 32;
  const uint32_t means = ptx::shared_address(shared) + warp * kWarpBlocks * tile.row_bytes;
  const bool all_past = tile.first + kBlocks <= past_blocks_of(step, tile.span);
  const int tiles = (tile.span.len + kRows - 1) / kRows;
  int head = tile.kv_head * group;
  const float scale = layout.sm_scale * kLog2E;
  load_rows<Element>(step, tile, head, 0, rows);
  load_means<Element>(step, tile, shared);
  LogSum sums[4];
  for (int i = 0, n = 0; i < tiles * group; ++i) {
    const int first = n * kRows, next_n = n + 1 < tiles ? n + 1 : 0;
    if (i + 1 < tiles * group) {
      load_rows<Element>(step, tile, next_n ? head : head + 1, next_n * kRows,
                         rows + (i + 1) % 2 * kRows * tile.row_bytes);
      ptx::wait_copies_but<1>();
    } else {
      ptx::wait_copies_but<0>();
    }
    __syncthreads();
    if (tile.first + warp * kWarpBlocks < tile.end) {
      Logits c = {};
      multiply_tile<Element>(c, means, rows + i % 2 * kRows * tile.row_bytes, layout.head_dim);
      if (!all_past || first + kRows > tile.span.len) hide(step, tile, first, c);
      fold(sums, c, scale);
      if (next_n == 0) finish(step, tile, head, sums);
    }
    head += next_n == 0;
    n = next_n;
    __syncthreads();  // the rows may be overwritten
  }
}

}  // namespace
}  // namespace compactattn

// Grid: (max_select_spans, num_kv_heads, ceil(max_blocks / 128)) x 128; dynamic shared memory
// `flashprefill_bytes`. `cells`: [max_select_spans, num_q_heads,
// 8 * ceil(max_blocks / 128)].
extern "C" __global__ void __launch_bounds__(128, 2)
    compactattn_flashprefill_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::sum_weights<__nv_bfloat16>(step);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    compactattn_flashprefill_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::sum_weights<__half>(step);
}

// After either, unless keep_rows does it. Grid: (max_select_spans, num_q_heads) x 256.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_flashprefill_relate(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  Span span;
  if (!step.stages.k_mean || !load_span(step, blockIdx.x, span)) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * step.layout.num_q_heads + blockIdx.y;
  const float best = best_of_peaks(step, span, row);
  float* scores = scores_of(step, blockIdx.x, blockIdx.y);
  const int past = past_blocks_of(step, span);
  for (int j = threadIdx.x; j < past; j += 256) scores[j] = related(scores[j], best);
}
