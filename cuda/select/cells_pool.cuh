// Cells by mean keys of a tile of blocks, and by keys of the blocks that are seen in part.
#pragma once

#include "../ptx/grid.cuh"
#include "cells_reader.cuh"
#include "means.cuh"

namespace compactattn::select {

constexpr int kPoolBlocks = kTileKeys;
using PoolMeans = Means<kThreads, kPoolBlocks>;

// Consecutive blocks, the cells of the rows that see them in part.
struct Tails {
  int first;
  int count;
  __device__ __forceinline__ int block(int i) const { return first + i; }
  __device__ __forceinline__ bool writes(int seen, int start, int end) const {
    return start < seen && seen < end;
  }
};

// Cells of the rows that see their block whole or not at all. They pass through shared memory, so
// that a warp stores neighbours of a row, `pitch` bytes apart; called by the whole CTA when the
// tiles are used up.
__device__ void write_pooled(const Step& step, const Tile& tile, int first,
                             const float (&logits)[2][kPoolBlocks / 8][4],
                             const int (&seen)[kMaxRows], char* shared, uint32_t pitch) {
  const int log2_block = step.layout.log2_block_tokens;
  const float scale = step.layout.sm_scale * kLog2E;
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

// Rows into shared memory, once the samples are there.
__device__ __forceinline__ void wait_for_rows(const Step& step, const Tile& tile, uint32_t queries,
                                              int (&seen)[kMaxRows]) {
  ptx::wait_for_earlier();
  load_rows(step, tile, queries, seen);
  ptx::commit_copies();
  ptx::wait_copies_but<0>();
  __syncthreads();
}

// By the Reader of `Keys` and its products with means, which are on their way before the samples
// are known.
template <class Keys>
__device__ __forceinline__ void pool(const Step& step, int index, char* shared) {
  __shared__ int seen[kMaxRows];
  if (index > 0 || !knows_spans(step)) ptx::wait_for_earlier();
  Tile tile;
  const bool found = find_tile(step, index, tile);
  const int pools = (step.layout.max_blocks + kPoolBlocks - 1) / kPoolBlocks;
  const int first = static_cast<int>(blockIdx.x) * kPoolBlocks;
  const int tail = static_cast<int>(blockIdx.x) - pools;
  const uint32_t queries = shared_address(shared);
  if (found && tail < 0 && first < tile.blocks) {
    const PoolMeans means(step, tile, first, tile.blocks);
    Keys::begin_means(step, means, shared);
    wait_for_rows(step, tile, queries, seen);
    float logits[2][kPoolBlocks / 8][4] = {};
    Keys::multiply_means(logits, step, tile, means, shared);
    write_pooled(step, tile, first, logits, seen, shared, Keys::cells_pitch(step.layout));
  }
  if (found && tail >= 0) {
    const int least = tile.least_visible >> step.layout.log2_block_tokens;
    // As short as there are CTAs for: all of them run at once, and the step waits for the last.
    const Share share(step.layout, tile.blocks - least, tail, gridDim.x - pools, 1);
    if (share.count > 0) {
      const Tails tails{least + share.first, share.count};
      typename Keys::template Reader<Tails> reader(step, tile, tails, queries);
      reader.begin();
      wait_for_rows(step, tile, queries, seen);
      reader.run(seen);
    }
  }
  ptx::wait_for_earlier();  // who has no work too
}

}  // namespace compactattn::select
