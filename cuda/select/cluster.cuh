// Scores of one (select span, KV head) from the cells of its only tile of sampled rows, and what
// follows from them, by one cluster: each CTA holds a slice of the blocks, and the rows' totals
// meet in shared memory. In place of cells_mass, union_table and two_level_candidates, launches
// that wait for one another.
//
// Grid (8, num_kv_heads, max_select_spans) x 256. A slice depends on the span alone and sums are
// taken in one order, so scores do not depend on the batch.
#pragma once

#include "../ptx/cluster.cuh"
#include "../ptx/grid.cuh"
#include "../union/list.cuh"
#include "candidates.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define COMPACTATTN_SCORING_CLUSTER __cluster_dims__(8, 1, 1)
#else
#define COMPACTATTN_SCORING_CLUSTER
#endif

namespace compactattn::select {

constexpr int kCtas = 8;
constexpr int kWide = cta::kThreads;

// What follows the scores, by number in rust/cuda/select.rs.
enum Then : int32_t {
  kScores = 0,
  kLists = 1,       // union and table; list spans are select spans
  kCandidates = 2,  // of two_level
};

// How the launch wants it.
struct Wish {
  int32_t then;    // Then
  int32_t pitch;   // floats between rows of a slice's cells in shared memory
  int32_t listed;  // blocks that are no candidates score 0 (or NaN)
};

static_assert(sizeof(Wish) == 12, "host code writes this layout");

// Weight of a row over some blocks: sum * 2^max.
struct alignas(8) Weight {
  float max;
  float sum;

  __device__ __forceinline__ void clear() { max = -FLT_MAX, sum = 0.0f; }

  __device__ __forceinline__ void merge(const Weight& other) {
    const float top = fmaxf(max, other.max);
    sum = sum * ptx::exp2_approx(max - top) + other.sum * ptx::exp2_approx(other.max - top);
    max = top;
  }
};

// What turns a row's cell into its share times 1 / samples: 2^(cell - max) * scale.
struct Norm {
  float max;
  float scale;
};

struct Exchange {
  Weight parts[2][kMaxRows];       // of this CTA, by whoever fills the cells
  Weight slices[kCtas][kMaxRows];  // of all CTAs
  Norm norms[kMaxRows];
};

// Consecutive blocks, a CTA's: row r's cell of block first + j is cells[r * pitch + j], shared
// memory.
struct Slice {
  int first;
  int count;
  float* cells;
  int pitch;
  bool is_kept;  // cells go to global memory too, for the kernels that read them
};

__device__ __forceinline__ int cluster_rank() { return static_cast<int>(blockIdx.x); }

__device__ __forceinline__ Slice slice_of(const Tile& tile, const Wish& wish, char* shared) {
  const int each = (tile.blocks + kCtas - 1) / kCtas, first = cluster_rank() * each;
  const int count = max(0, min(each, tile.blocks - first));
  return {first, count, reinterpret_cast<float*>(shared), wish.pitch, wish.then == kCandidates};
}

// Norms of all rows; called by all CTAs, each with its `parts`. All have arrived at the cluster's
// barrier once: nobody writes to a CTA that has not started.
__device__ inline void weigh_rows(const Tile& tile, Exchange& shared) {
  __syncthreads();
  const int row = threadIdx.x % kMaxRows;
  Weight mine = shared.parts[0][row];
  mine.merge(shared.parts[1][row]);
  ptx::wait_for_cluster();
  for (int rank = threadIdx.x / kMaxRows; rank < kCtas; rank += kWide / kMaxRows) {
    float2* to = reinterpret_cast<float2*>(&shared.slices[cluster_rank()][row]);
    ptx::store_to(rank, to, {mine.max, mine.sum});
  }
  ptx::fence_cluster();
  __syncwarp();
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
  if (threadIdx.x < kMaxRows) {
    Weight all = shared.slices[0][row];
#pragma unroll
    for (int rank = 1; rank < kCtas; ++rank) all.merge(shared.slices[rank][row]);
    shared.norms[row] = {all.max, 1.0f / tile.samples.count / all.sum};
  }
  __syncthreads();
}

// Mean shares of the slice's past blocks, a head's samples in their order.
__device__ inline void write_scores(const Step& step, const Tile& tile, const Slice& slice,
                                    const uint32_t* candidates, const Exchange& shared) {
  const Layout& layout = step.layout;
  const int past = past_blocks(layout, tile.span), count = min(slice.count, past - slice.first);
  const int64_t head = static_cast<int64_t>(blockIdx.z) * layout.num_q_heads +
                       static_cast<int64_t>(tile.kv_head) * layout.group_size;
  for (int at = threadIdx.x; at < layout.group_size * count; at += kWide) {
    const int h = at / count, j = at - h * count, row = h * tile.samples.tokens;
    const float* cells = slice.cells + row * slice.pitch + j;
    float mass = 0.0f;
#pragma unroll 8
    for (int i = 0; i < tile.samples.tokens; ++i) {
      const Norm norm = shared.norms[row + i];
      mass += ptx::exp2_approx(cells[i * slice.pitch] - norm.max) * norm.scale;
    }
    const int block = slice.first + j;
    const bool counts = !candidates || (candidates[block / 32] >> block % 32 & 1);
    if (!counts && !isnan(mass)) mass = 0.0f;
    step.stages.scores[(head + h) * layout.max_blocks + block] = mass;
  }
}

// `fill(tile, slice, exchange)` fills the cells of the slice and both parts of the exchange, by the
// whole CTA, once it has waited for earlier kernels: before, spans are there and samples are not.
template <class Fill>
__device__ __forceinline__ void score(const Step& step, const Wish& wish, char* shared, Fill fill) {
  __shared__ Exchange exchange;
  const int kv_head = blockIdx.y, index = blockIdx.z;
  if (wish.then == kLists && blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) {
    count_call(step.stages);
  }
  if (index >= step.stages.counters->num_select_spans) return ptx::wait_for_earlier();
  const Span select_span = step.stages.select_spans[index];
  const Span list_span = step.stages.list_spans[index];
  Tile tile;
  const bool scored = !select_span.dense && past_blocks(step.layout, select_span) > 0 &&
                      tile_of(step, select_span, 0, index, kv_head, tile);
  if (scored) {
    __syncwarp();  // one thread counted
    ptx::arrive_at_cluster();
    const Slice slice = slice_of(tile, wish, shared);
    fill(tile, slice, exchange);
    weigh_rows(tile, exchange);
    write_scores(step, tile, slice, wish.listed ? candidates_of(step, index, kv_head) : nullptr,
                 exchange);
    ptx::fence_cluster();
    __syncwarp();
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
  } else {
    ptx::wait_for_earlier();
  }
  uint32_t* dynamic = reinterpret_cast<uint32_t*>(shared);  // the cells are of no more use
  if (wish.then == kCandidates && scored && cluster_rank() == 0) {
    choose_candidates(step, tile.span, index, kv_head, dynamic);
  }
  if (wish.then != kLists) return;
  for (int i = cluster_rank(); i < step.layout.lists_per_kv_head; i += kCtas) {
    const int part = kv_head * step.layout.lists_per_kv_head + i;
    write_list(step, index, list_span, part, false, dynamic);
    __syncthreads();
  }
}

}  // namespace compactattn::select
