// select: scores of one query head from the cells of a span's only tile, where a head has no more
// than 32 sampled rows and registers hold them, and union and table after them. What cells_mass and
// union_table do, in one launch.
//
// Grid (kParts num_q_heads, max_select_spans) x 512, dynamic shared memory as union_table.cu. A
// thread of a head's kParts CTAs has two blocks' cells of all its rows in registers, so cells are
// read once; sums are taken in one order that depends on the span alone. Such a CTA fills an SM, so
// short rows have a unit with fewer of them a head.
#pragma once

#define COMPACTATTN_CTA_THREADS 512
#include "cluster.cuh"

namespace compactattn::select {
namespace {

constexpr int kParts = COMPACTATTN_HEAD_CTAS;
constexpr int kRows = 32;    // of a head at most
constexpr int kColumns = 2;  // blocks of a thread
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define COMPACTATTN_CLUSTER_OF_PARTS __cluster_dims__(COMPACTATTN_HEAD_CTAS, 1, 1)
#else
#define COMPACTATTN_CLUSTER_OF_PARTS
#endif
static_assert(kRows == 2 * cta::kWarps, "half a warp for each row");

struct HeadExchange {
  float warps[cta::kWarps][kRows + 1];  // what each warp knows of each row
  alignas(16) float tops[kRows];        // of this CTA
  alignas(16) float factors[kRows];
  Weight parts[kParts][kRows];  // of all CTAs
};

using Column = float[kRows];

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Plus {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Lane r gets the join over the warp's lanes of their `rows[r]`: 31 exchanges for 32 rows.
template <int kHalf, class Join>
__device__ __forceinline__ float join_lanes(const float (&rows)[2 * kHalf], Join join) {
  const bool is_high = threadIdx.x & kHalf;
  float mine[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = rows[i], high = rows[i + kHalf];
    const float other = __shfl_xor_sync(0xffffffffu, is_high ? low : high, kHalf);
    mine[i] = join(is_high ? high : low, other);
  }
  if constexpr (kHalf == 1) {
    return mine[0];
  } else {
    return join_lanes<kHalf / 2>(mine, join);
  }
}

// The row whose join over the CTA this thread learns.
__device__ __forceinline__ int joined_row() { return static_cast<int>(threadIdx.x) / 16; }

template <class Join>
__device__ __forceinline__ float join_rows(const Column (&cells)[kColumns], HeadExchange& shared,
                                           Join join) {
  Column both;
#pragma unroll
  for (int row = 0; row < kRows; ++row) both[row] = join(cells[0][row], cells[1][row]);
  shared.warps[threadIdx.x / 32][threadIdx.x % 32] = join_lanes<kRows / 2>(both, join);
  __syncthreads();
  float all = shared.warps[threadIdx.x % 16][joined_row()];
#pragma unroll
  for (int d = 8; d > 0; d /= 2) all = join(all, __shfl_xor_sync(0xffffffffu, all, d));
  return all;
}

// visit(row, value) for each of kRows values in shared memory.
template <class Visit>
__device__ __forceinline__ void each_row(const Column& values, Visit visit) {
#pragma unroll
  for (int row = 0; row < kRows; row += 4) {
    const float4 four = *reinterpret_cast<const float4*>(values + row);
    visit(row, four.x);
    visit(row + 1, four.y);
    visit(row + 2, four.z);
    visit(row + 3, four.w);
  }
}

// Cells become shares of this CTA's largest of their row, and `factors` what turns them into shares
// of the row times 1 / samples; called by all CTAs, that have arrived at the cluster's barrier.
__device__ __forceinline__ void weigh_rows(const Samples& samples, int part,
                                           Column (&cells)[kColumns], HeadExchange& shared) {
  const float top = fmaxf(join_rows(cells, shared, Max{}), -FLT_MAX);
  if (threadIdx.x % 16 == 0) shared.tops[joined_row()] = top;
  __syncthreads();
  each_row(shared.tops, [&](int row, float of) {
#pragma unroll
    for (Column& column : cells) column[row] = ptx::exp2_approx(column[row] - of);
  });
  const float sum = join_rows(cells, shared, Plus{});
  ptx::wait_for_cluster();
  const int rank = threadIdx.x % 16;
  if (rank < kParts) {
    ptx::store_to(rank, reinterpret_cast<float2*>(&shared.parts[part][joined_row()]), {top, sum});
  }
  ptx::fence_cluster();
  __syncwarp();
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
  const int row = threadIdx.x;
  if (row < kRows) {
    Weight all = shared.parts[0][row];
#pragma unroll
    for (int i = 1; i < kParts; ++i) all.merge(shared.parts[i][row]);
    const float share = ptx::exp2_approx(shared.tops[row] - all.max);
    shared.factors[row] = row < samples.tokens ? share / samples.count / all.sum : 0.0f;
  }
  __syncthreads();
}

// What this CTA has of a head, and its thread's blocks of that.
struct Part {
  int index;
  int first;  // block
  int end;

  __device__ __forceinline__ explicit Part(const Tile& tile) {
    index = static_cast<int>(blockIdx.x % kParts);
    const int each = ((tile.blocks + kParts - 1) / kParts + 31) / 32 * 32;
    first = index * each;
    end = min(first + each, tile.blocks);
  }

  __device__ __forceinline__ int block(int column) const {
    return first + column * cta::kThreads + static_cast<int>(threadIdx.x);
  }
};

__device__ __forceinline__ void load_cells(const Step& step, const Tile& tile, const Part& part,
                                           int head, Column (&cells)[kColumns]) {
  const int64_t stride = step.layout.max_blocks;
  const float* from =
      tile.cells + head % step.layout.group_size * tile.samples.tokens * stride + part.block(0);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      cells[c][row] = part.block(c) < part.end ? __ldcg(from + c * cta::kThreads) : -INFINITY;
    }
    if (row + 1 < tile.samples.tokens) from += stride;  // rows past the last weigh nothing
  }
}

// Scores of this CTA's blocks of a head: the mean over its rows of each block's share.
__device__ __forceinline__ void score_head(const Step& step, const Tile& tile, const Part& part,
                                           int head, const uint32_t* candidates,
                                           float (&masses)[kColumns]) {
  __shared__ HeadExchange shared;
  Column cells[kColumns];
  load_cells(step, tile, part, head, cells);
  weigh_rows(tile.samples, part.index, cells, shared);
  each_row(shared.factors, [&](int row, float factor) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) masses[c] = fmaf(cells[c][row], factor, masses[c]);
  });
  if (!candidates) return;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int block = part.block(c);
    const bool counts = block >= part.end || (candidates[block / 32] >> block % 32 & 1);
    if (!counts && !isnan(masses[c])) masses[c] = 0.0f;
  }
}

// visit(block, mass) for this thread's past blocks.
template <class Visit>
__device__ __forceinline__ void each_past(const Step& step, const Tile& tile, const Part& part,
                                          const float (&masses)[kColumns], Visit visit) {
  const int end = min(part.end, past_blocks(step.layout, tile.span));
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (part.block(c) < end) visit(part.block(c), masses[c]);
  }
}

// Tells the first CTA's `shared`, one for each warp of the cluster, what this warp has of a row.
__device__ __forceinline__ void tell(const Survey& warp, int part, Survey* shared) {
  const Survey seen = join_lanes(warp);
  if (threadIdx.x % 32 != 0) return;
  Survey* to = shared + part * cta::kWarps + threadIdx.x / 32;
  ptx::store_to(0, &to->heaviest, seen.heaviest);
  ptx::store_to(0, &to->best, seen.best);
  ptx::store_to(0, &to->worst, seen.worst);
  ptx::store_to(0, &to->unjudged, seen.unjudged);
  ptx::store_to(0, &to->at_threshold, seen.at_threshold);
}

__device__ __forceinline__ Survey join_told(const Survey* shared) {
  const int lane = threadIdx.x % 32;
  Survey seen = nothing_seen();
#pragma unroll
  for (int i = 0; i < kParts * cta::kWarps; i += 32) seen = join(seen, shared[i + lane]);
  return join_lanes(seen);
}

// Hands the first CTA the list's only row.
__device__ __forceinline__ void hand_over(const Step& step, const Tile& tile, const Part& part,
                                          const float (&masses)[kColumns], float* merged,
                                          Survey* surveys) {
  const auto row = row_of(step.settings, merged, past_blocks(step.layout, tile.span));
  const uint32_t threshold = rank_of(step.settings.keep_value);
  Survey seen = nothing_seen();
  each_past(step, tile, part, masses, [&](int block, float mass) {
    ptx::store_to(0, merged + block, mass);
    look(seen, row, threshold, block, mass);
  });
  tell(seen, part.index, surveys);
}

__device__ __forceinline__ void arrive_with_writes() {
  ptx::fence_cluster();
  __syncwarp();
  ptx::arrive_at_cluster();
}

// Whether a list's merged scores are those of its only row, and the first CTA can be handed them.
__device__ __forceinline__ bool is_one_row(const Step& step, const Wish& wish, const Span& list) {
  return wish.then == kLists && step.layout.heads_per_list == 1 && list.num_selects == 1 &&
         row_is_shared(step.layout);
}

__device__ __forceinline__ void mass_lists(const Step& step, const Wish& wish, uint32_t* dynamic) {
  __shared__ Survey surveys[kParts * cta::kWarps];
  const int head = blockIdx.x / kParts, index = blockIdx.y;
  // Only cells come from the kernel right before this one. As each lets the next start once it has
  // waited itself, those before it, whose spans and samples these are, are done. Without pages that
  // kernel is not launched.
  if (step.batch.num_pages == 0) ptx::wait_for_earlier();
  // Of any value, but loaded early; beside scores alone there need be none.
  const Span list_span = wish.then == kLists ? step.stages.list_spans[index] : Span{};
  const bool is_there = index < step.stages.counters->num_select_spans;
  Tile tile;
  const bool scored = tile_at(step, 0, index, head / step.layout.group_size, tile);
  ptx::wait_for_earlier();
  if (wish.then == kLists && blockIdx.x + blockIdx.y + threadIdx.x == 0) count_call(step.stages);
  if (!is_there) return;
  const bool handed = scored && is_one_row(step, wish, list_span);
  if (scored) {
    __syncwarp();              // one thread counted
    ptx::arrive_at_cluster();  // whose CTAs all run from here on: their shared memory is written
    const Part part(tile);
    float masses[kColumns] = {};
    score_head(step, tile, part, head,
               wish.listed ? candidates_of(step, index, tile.kv_head) : nullptr, masses);
    if (handed) {
      // Before the row goes to global memory, for which nobody here waits.
      hand_over(step, tile, part, masses, shared_row(step.layout, dynamic), surveys);
      arrive_with_writes();
    }
    float* scores =
        step.stages.scores +
        (static_cast<int64_t>(index) * step.layout.num_q_heads + head) * step.layout.max_blocks;
    each_past(step, tile, part, masses, [&](int block, float mass) { scores[block] = mass; });
  }
  if (wish.then != kLists) return;
  if (scored) {
    if (!handed) arrive_with_writes();
    ptx::wait_for_cluster();
  }
  if (blockIdx.x % kParts != 0) return;
  const Survey seen = handed ? join_told(surveys) : nothing_seen();
  write_list(step, index, list_span, head, false, dynamic, handed, seen);
}

}  // namespace
}  // namespace compactattn::select
