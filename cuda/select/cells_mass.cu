// select: scores from cells: the mean over a head's sampled rows of each past block's share of the
// row's weight (rust/select/cells.rs, Cells::add_mass).
//
// Grid (num_q_heads, max_select_spans) x 1024. The first tile of a span stores its scores, later
// ones add, in launch order: the same bits in every run and whatever else is in the batch. A NaN
// cell makes NaN of its whole row, hence of its head's scores.
#include "../ptx/grid.cuh"
#include "cells.cuh"

namespace compactattn::select {
namespace {

constexpr int kMassThreads = 1024;
constexpr int kBatch = 8;  // loads under way of a thread

// What turns a row's cell into its share times 1 / samples: 2^(cell - max) * scale.
struct Norm {
  float max;
  float scale;
};

// Folds one row of cells, by one warp.
__device__ Norm norm_of(const float* cells, int blocks, int samples) {
  const int lane = threadIdx.x % 32;
  float top = -FLT_MAX, sum = 0.0f;
  for (int j = lane; j < blocks; j += 32 * kBatch) {
    float x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[i] = j + 32 * i < blocks ? cells[j + 32 * i] : -INFINITY;
    float higher = top;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) higher = fmaxf(higher, x[i]);
    sum *= ptx::exp2_approx(top - higher);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += ptx::exp2_approx(x[i] - higher);
    top = higher;
  }
  const float mine = top;
  for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  sum *= ptx::exp2_approx(mine - top);
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  return {top, 1.0f / samples / sum};
}

// Every past block counts.
struct EveryBlock {
  __device__ EveryBlock(const Step&, int, int) {}
  __device__ __forceinline__ bool has(int) const { return true; }
};

// Other blocks than candidates score 0.
struct Candidates {
  const uint32_t* bits;
  __device__ Candidates(const Step& step, int span, int kv_head)
      : bits(candidates_of(step, span, kv_head)) {}
  __device__ __forceinline__ bool has(int block) const {
    return bits[block / 32] >> block % 32 & 1;
  }
};

template <class Blocks>
__device__ __forceinline__ void add_mass(const Step& step, int index) {
  __shared__ Norm norms[kMaxRows];
  const int head = blockIdx.x, span_index = blockIdx.y;
  const Span* span = scored_span(step, span_index);
  if (!span) return;
  const Samples samples = samples_of(step, *span, index);
  if (samples.tokens <= 0) return;
  const Layout& layout = step.layout;
  const int last = samples.first + samples.tokens - 1;
  const int kv_end = visible(*span, sampled_token(*span, samples.count, last));
  const int blocks = (kv_end + (1 << layout.log2_block_tokens) - 1) >> layout.log2_block_tokens;
  const int kv_head = head / layout.group_size;
  const int64_t stride = layout.max_blocks;
  const float* cells =
      cells_of(step, span_index, kv_head) + head % layout.group_size * samples.tokens * stride;
  for (int i = threadIdx.x / 32; i < samples.tokens; i += kMassThreads / 32) {
    const Norm norm = norm_of(cells + i * stride, blocks, samples.count);
    if (threadIdx.x % 32 == 0) norms[i] = norm;
  }
  __syncthreads();
  const Blocks counted(step, span_index, kv_head);
  const int64_t row = static_cast<int64_t>(span_index) * layout.num_q_heads + head;
  float* scores = step.stages.scores + row * stride;
  const int past = past_blocks(layout, *span);
  for (int j = threadIdx.x; j < past; j += kMassThreads) {
    float mass = 0.0f;
#pragma unroll 8
    for (int i = 0; i < samples.tokens; ++i) {
      mass += ptx::exp2_approx(cells[i * stride + j] - norms[i].max) * norms[i].scale;
    }
    if (!counted.has(j) && !isnan(mass)) mass = 0.0f;
    scores[j] = index == 0 ? mass : scores[j] + mass;
  }
}

}  // namespace
}  // namespace compactattn::select

// Adds the masses of tile `tile` to the scores.
extern "C" __global__ void __launch_bounds__(1024)
    compactattn_cells_mass(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::add_mass<compactattn::select::EveryBlock>(step, tile);
}

// As compactattn_cells_mass, but blocks that are no candidates score 0 (or NaN).
extern "C" __global__ void __launch_bounds__(1024)
    compactattn_two_level_mass(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::add_mass<compactattn::select::Candidates>(step, tile);
}
