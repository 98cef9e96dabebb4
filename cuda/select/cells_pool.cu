// select: cells by mean keys where a row sees the whole block, by the keys of the one block that it
// sees in part (rust/select/pooled_mass.rs).
//
// Grid (ceil(max_blocks / 64) + tails, num_kv_heads, max_select_spans) x 128, shared memory as
// cells_read.cu. `tails` CTAs (any > 0) of a (span, KV head) share the blocks seen in part; of a
// span of n tokens ceil(n / 128) + 1 have work. Weighs a block block_size * 2^(q . k_mean), with
// the mean key as the sum of two 16-bit vectors: bf16 pairs hold 16 bits of it, fp16 pairs 22 or
// down to 2^-25.
#include "../ptx/grid.cuh"
#include "cells_reader.cuh"

namespace compactattn::select {
namespace {

constexpr int kPoolBlocks = kTileKeys;

// Consecutive blocks, the cells of the rows that see them in part.
struct Tails {
  int first;
  int count;
  __device__ __forceinline__ int block(int i) const { return first + i; }
  __device__ __forceinline__ bool writes(int seen, int start, int end) const {
    return start < seen && seen < end;
  }
};

__device__ __forceinline__ const float* mean_key(const Step& step, const Tile& tile, int block) {
  const Layout& layout = step.layout;
  const int last = ((block + 1) << layout.log2_block_tokens) - 1;
  const int64_t page = __ldg(step.batch.block_table + step.batch.table_stride * tile.span.req +
                             (last >> layout.log2_page_tokens));
  const int slots = 1 << max(0, layout.log2_page_tokens - layout.log2_block_tokens);
  const int64_t slot = page * slots + (block & (slots - 1));
  return step.stages.k_mean + (slot * layout.num_kv_heads + tile.kv_head) * layout.head_dim;
}

template <class Element>
__device__ __forceinline__ uint32_t high_and_rest(float& x, float& y);

template <>
__device__ __forceinline__ uint32_t high_and_rest<__nv_bfloat16>(float& x, float& y) {
  const __nv_bfloat162 high = __floats2bfloat162_rn(x, y);
  x -= __low2float(high);
  y -= __high2float(high);
  return reinterpret_cast<const uint32_t&>(high);
}

template <>
__device__ __forceinline__ uint32_t high_and_rest<__half>(float& x, float& y) {
  const __half2 high = __floats2half2_rn(x, y);
  x -= __low2float(high);
  y -= __high2float(high);
  return reinterpret_cast<const uint32_t&>(high);
}

// Mean keys of kPoolBlocks blocks from `first` on, their high parts in one tile, the rest in the
// next; zeros for blocks that are not whole.
template <class Element>
__device__ void load_means(const Step& step, const Tile& tile, int first, char* high) {
  constexpr int kLanes = 8, kStep = kThreads / kLanes, kRows = kPoolBlocks / kStep;
  const uint32_t pitch = pitch_of(step.layout);
  const int whole = tile.kv_end >> step.layout.log2_block_tokens;
  const int from = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const float* means[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int block = first + from + r * kStep;
    means[r] = block < whole ? mean_key(step, tile, block) : nullptr;
  }
  // All rows' loads are under way before the first is used.
#pragma unroll 2
  for (int d = 4 * lane; d < step.layout.head_dim; d += 4 * kLanes) {
    float4 x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = means[r] ? __ldg(reinterpret_cast<const float4*>(means[r] + d)) : float4{};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      char* to = high + (from + r * kStep) * pitch + 2 * d;
      uint2 words;
      words.x = high_and_rest<Element>(x[r].x, x[r].y);
      words.y = high_and_rest<Element>(x[r].z, x[r].w);
      *reinterpret_cast<uint2*>(to) = words;
      words.x = pack_pair<Element>(x[r].x, x[r].y);
      words.y = pack_pair<Element>(x[r].z, x[r].w);
      *reinterpret_cast<uint2*>(to + kPoolBlocks * pitch) = words;
    }
  }
}

// Cells of the rows that see their block whole or not at all. They pass through shared memory, so
// that a warp stores neighbours of a row; called by the whole CTA when the tiles are used up.
__device__ void write_pooled(const Step& step, const Tile& tile, int first,
                             const float (&logits)[2][kPoolBlocks / 8][4],
                             const int (&seen)[kMaxRows], char* shared) {
  const int log2_block = step.layout.log2_block_tokens;
  const float scale = step.layout.sm_scale * kLog2E;
  // Two vectors of the tiles give way to one row of cells, 256 bytes, whatever the head_dim.
  const uint32_t pitch = 2 * pitch_of(step.layout);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float* cells = reinterpret_cast<float*>(shared + fragment_row(r) * pitch);
#pragma unroll
    for (int n = 0; n < 2 * (kPoolBlocks / 8); ++n) {
      cells[n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2] =
          fmaf(logits[r / 2][n / 2][r % 2 * 2 + n % 2], scale, log2_block);
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int i = threadIdx.x / 32; i < 2 * tile.rows; i += kThreads / 32) {
    const int row = i / 2, column = i % 2 * 32 + lane, block = first + column;
    const float cell = reinterpret_cast<const float*>(shared + row * pitch)[column];
    const bool is_whole = block < seen[row] >> log2_block;
    // The block in which the row ends is left to `Tails`.
    if (block >= tile.blocks || (!is_whole && block << log2_block < seen[row])) continue;
    tile.cells[static_cast<int64_t>(row) * step.layout.max_blocks + block] =
        is_whole ? cell : -INFINITY;
  }
}

template <class Element, class Stored = Element>
__device__ __forceinline__ void pool(const Step& step, int index, char* shared) {
  __shared__ int seen[kMaxRows];
  Tile tile;
  if (!find_tile(step, index, tile)) return;
  const int pools = (step.layout.max_blocks + kPoolBlocks - 1) / kPoolBlocks;
  const int first = static_cast<int>(blockIdx.x) * kPoolBlocks;
  const int tail = static_cast<int>(blockIdx.x) - pools;
  const uint32_t queries = shared_address(shared);
  if (tail < 0) {
    if (first >= tile.blocks) return;
    load_rows(step, tile, queries, seen);
    ptx::commit_copies();
    const uint32_t stages = kMaxRows * pitch_of(step.layout);
    load_means<Element>(step, tile, first, shared + stages);
    ptx::wait_copies_but<0>();
    __syncthreads();
    float logits[2][kPoolBlocks / 8][4] = {};
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
    if (warp_row < tile.rows) {
      const uint32_t rows = queries + warp_row * pitch_of(step.layout);
      const uint32_t high = queries + stages, rest = high + kPoolBlocks * pitch_of(step.layout);
      multiply<Element>(logits, rows, high, step.layout);
      multiply<Element>(logits, rows, rest, step.layout);
    }
    return write_pooled(step, tile, first, logits, seen, shared);
  }
  const int least = tile.least_visible >> step.layout.log2_block_tokens;
  // As short as there are CTAs for: all of them run at once, and the step waits for the last.
  const Share share(step.layout, tile.blocks - least, tail, gridDim.x - pools, 1);
  if (share.count <= 0) return;
  load_rows(step, tile, queries, seen);
  __syncthreads();
  const Tails tails{least + share.first, share.count};
  Reader<Element, Tails, Stored>(step, tile, tails, queries, seen).run();
}

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_bf16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::pool<__nv_bfloat16>(step, tile, shared_bytes);
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_fp16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::pool<__half>(step, tile, shared_bytes);
}

// The same over caches of e4m3.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_bf16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::pool<__nv_bfloat16, compactattn::E4m3>(step, tile, shared_bytes);
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_fp16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::pool<__half, compactattn::E4m3>(step, tile, shared_bytes);
}
