// select: scores from cells: the mean over a head's sampled rows of each past block's share of the
// row's weight (rust/select/cells.rs, Cells::add_mass).
//
// Grid (4 num_q_heads, max_select_spans) x 1024; four CTAs share a head's rows, then its blocks.
// The first tile of a span stores its scores, later ones add, in launch order: the same bits in
// every run and whatever else is in the batch. A NaN cell makes NaN of its whole row, hence of its
// head's scores.
#include "../ptx/cluster.cuh"
#include "../ptx/grid.cuh"
#include "cells.cuh"

namespace compactattn::select {
namespace {

constexpr int kMassThreads = 1024;
constexpr int kParts = 4;  // CTAs of a head
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kRowParts = kParts;  // CTAs that share the rows, as a cluster
#define COMPACTATTN_CLUSTER_OF_PARTS __cluster_dims__(4, 1, 1)
#else
constexpr int kRowParts = 1;  // each by itself folds all rows
#define COMPACTATTN_CLUSTER_OF_PARTS
#endif
constexpr int kRowThreads = 128;  // that fold a row together: most of the time is latency
constexpr int kBatch = 8;         // loads under way of a thread

// What turns a row's cell into its share times 1 / samples: 2^(cell - max) * scale.
struct Norm {
  float max;
  float scale;
};

// What some lanes or warps know of a row.
struct Weight {
  float max;
  float sum;

  __device__ __forceinline__ void add(Weight other) {
    const float higher = fmaxf(max, other.max);
    sum = sum * ptx::exp2_approx(max - higher) + other.sum * ptx::exp2_approx(other.max - higher);
    max = higher;
  }
};

// A lane's part of a row of cells, which kRowThreads threads fold.
__device__ Weight weight_of(const float* cells, int blocks) {
  Weight mine{-FLT_MAX, 0.0f};
  for (int j = threadIdx.x % kRowThreads; j < blocks; j += kRowThreads * kBatch) {
    float x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = j + kRowThreads * i;
      x[i] = at < blocks ? cells[at] : -INFINITY;
    }
    float higher = mine.max;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) higher = fmaxf(higher, x[i]);
    mine.sum *= ptx::exp2_approx(mine.max - higher);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) mine.sum += ptx::exp2_approx(x[i] - higher);
    mine.max = higher;
  }
  return mine;
}

// Fills `norms` for all rows [rows, blocks] of the head; called by all CTAs of the cluster.
__device__ void fold_rows(const float* cells, int64_t stride, int blocks, const Samples& samples,
                          Norm* norms) {
  constexpr int kRows = kMassThreads / kRowThreads;  // at a time
  constexpr int kWarps = kRowThreads / 32;           // of a row
  __shared__ Weight weights[kRows][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int mine = threadIdx.x / kRowThreads;
  const int part = kRowParts == 1 ? 0 : static_cast<int>(blockIdx.x % kParts);
  for (int first = part * kRows; first < samples.tokens; first += kRowParts * kRows) {
    const int row = first + mine;
    if (row < samples.tokens) {
      Weight weight = weight_of(cells + row * stride, blocks);
      for (int d = 16; d > 0; d /= 2) {
        const float max = __shfl_xor_sync(0xffffffffu, weight.max, d);
        weight.add({max, __shfl_xor_sync(0xffffffffu, weight.sum, d)});
      }
      if (lane == 0) weights[mine][warp % kWarps] = weight;
    }
    __syncthreads();
    if (threadIdx.x < kRows && first + threadIdx.x < samples.tokens) {
      Weight weight = weights[threadIdx.x][0];
      for (int i = 1; i < kWarps; ++i) weight.add(weights[threadIdx.x][i]);
      Norm* to = norms + first + threadIdx.x;
      ptx::store_to_all<kRowParts>(&to->max, weight.max);
      ptx::store_to_all<kRowParts>(&to->scale, 1.0f / samples.count / weight.sum);
    }
    __syncthreads();
  }
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
  const int head = blockIdx.x / kParts, part = blockIdx.x % kParts, span_index = blockIdx.y;
  const Span* span = scored_span(step, span_index);
  if (!span) return;
  const Samples samples = samples_of(step, *span, index);
  if (samples.tokens <= 0) return;
  const Layout& layout = step.layout;
  const int last = samples.first + samples.tokens - 1;
  const int kv_head = head / layout.group_size;
  const int* tokens = samples_at(step, span_index, kv_head);
  const int kv_end = visible(*span, sampled_token(*span, tokens, samples.count, last));
  const int blocks = (kv_end + (1 << layout.log2_block_tokens) - 1) >> layout.log2_block_tokens;
  const int64_t stride = layout.max_blocks;
  const float* cells =
      cells_of(step, span_index, kv_head) + head % layout.group_size * samples.tokens * stride;
  ptx::arrive_at_cluster();  // whose CTAs all run from here on: their shared memory is written
  ptx::wait_for_cluster();
  fold_rows(cells, stride, blocks, samples, norms);
  ptx::fence_cluster();
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
  const Blocks counted(step, span_index, kv_head);
  const int64_t row = static_cast<int64_t>(span_index) * layout.num_q_heads + head;
  float* scores = step.stages.scores + row * stride;
  const int past = past_blocks(layout, *span);
  for (int j = part * kMassThreads + threadIdx.x; j < past; j += kParts * kMassThreads) {
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
extern "C" __global__ void COMPACTATTN_CLUSTER_OF_PARTS __launch_bounds__(1024)
    compactattn_cells_mass(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::add_mass<compactattn::select::EveryBlock>(step, tile);
}

// As compactattn_cells_mass, but blocks that are no candidates score 0 (or NaN).
extern "C" __global__ void COMPACTATTN_CLUSTER_OF_PARTS __launch_bounds__(1024)
    compactattn_two_level_mass(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::add_mass<compactattn::select::Candidates>(step, tile);
}
