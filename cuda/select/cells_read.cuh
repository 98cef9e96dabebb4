// Which blocks of keys a CTA of cells_read.cu reads: its share of those a row sees, or of the
// candidates.
#pragma once

#include "../ptx/grid.cuh"
#include "cells_reader.cuh"

namespace compactattn::select {

constexpr int kMaxListed = 1024;

// Blocks of a list, every cell.
struct Listed {
  const int* blocks;
  int count;
  __device__ __forceinline__ int block(int i) const { return blocks[i]; }
  __device__ __forceinline__ bool writes(int, int, int) const { return true; }
};

// Every block that a row of tile `index` sees, by the Reader of `Keys`.
template <class Keys>
__device__ __forceinline__ void read_all(const Step& step, int index, uint32_t shared) {
  __shared__ int seen[kMaxRows];
  Tile tile;
  if (!find_tile(step, index, tile)) return;
  const Share share(step.layout, tile.blocks, blockIdx.x, gridDim.x);
  if (share.count <= 0) return;
  load_rows(step, tile, shared, seen);
  __syncthreads();
  const BlockRange range{share.first, share.count};
  typename Keys::template Reader<BlockRange> reader(step, tile, range, shared);
  reader.begin();
  reader.run(seen);
}

// The blocks to read, ascending: candidates, then open blocks. Each thread knows those of its
// words.
struct Candidates {
  const uint32_t* bits;
  int past;
  int begin;  // words of this thread
  int end;
  int before;  // candidates in the words of lower threads
  int total;   // candidates

  // Called by the whole CTA.
  __device__ Candidates(const Step& step, const Tile& tile)
      : bits(candidates_of(step, blockIdx.z, tile.kv_head)),
        past(past_blocks(step.layout, tile.span)) {
    __shared__ int warps[kThreads / 32];
    const int words = (past + 31) / 32, each = (words + kThreads - 1) / kThreads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    begin = min(words, static_cast<int>(threadIdx.x) * each);
    end = min(words, begin + each);
    int mine = 0;
    for (int w = begin; w < end; ++w) mine += __popc(bits[w]);
    before = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, before, d);
      if (lane >= d) before += below;
    }
    if (lane == 31) warps[warp] = before;
    __syncthreads();
    before -= mine;
    total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warps[w];
      total += warps[w];
    }
  }

  // Writes blocks `first` .. `first + count` of all those to read; called by the whole CTA.
  __device__ void list(int first, int count, int* into) const {
    int rank = before - first;
    for (int w = begin; w < end && rank < count; ++w) {
      for (uint32_t left = bits[w]; left != 0; left &= left - 1, ++rank) {
        if (rank >= 0 && rank < count) into[rank] = w * 32 + __ffs(left) - 1;
      }
    }
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (first + i >= total) into[i] = past + first + i - total;
    }
    __syncthreads();
  }
};

// Candidates and open blocks alone; the other cells stay.
template <class Keys>
__device__ __forceinline__ void read_candidates(const Step& step, int index, uint32_t shared) {
  __shared__ int seen[kMaxRows];
  __shared__ int list[kMaxListed];
  Tile tile;
  if (!find_tile(step, index, tile)) return;
  const Candidates candidates(step, tile);
  const int count = candidates.total + tile.blocks - candidates.past;
  const Share share(step.layout, count, blockIdx.x, gridDim.x);
  if (share.count <= 0) return;
  load_rows(step, tile, shared, seen);
  Listed listed{list, 0};
  for (int done = 0; done < share.count; done += listed.count) {
    listed.count = min(kMaxListed, share.count - done);
    candidates.list(share.first + done, listed.count, list);
    typename Keys::template Reader<Listed> reader(step, tile, listed, shared);
    reader.begin();
    reader.run(seen);
  }
}

}  // namespace compactattn::select
