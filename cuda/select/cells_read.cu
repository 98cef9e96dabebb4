// select: cells by the blocks' keys, exact (rust/select/cells.rs, Cells::read).
//
// A launch streams the keys of its blocks once and serves one tile of sampled rows of every (select
// span, KV head): grid (any > 0, num_kv_heads, max_select_spans) x 128, 256 * (2 * head_dim + 16)
// bytes of shared memory. CTAs of a (span, KV head) share its blocks evenly; 3 fit an SM, so about
// 3 * SMs / num_kv_heads of them fill a GPU. What a cell holds does not depend on how many there
// are.
#include "../ptx/grid.cuh"
#include "cells_reader.cuh"

namespace compactattn::select {
namespace {

constexpr int kMaxListed = 1024;

// Blocks of a list, every cell.
struct Listed {
  const int* blocks;
  int count;
  __device__ __forceinline__ int block(int i) const { return blocks[i]; }
  __device__ __forceinline__ bool writes(int, int, int) const { return true; }
};

template <class Element, class Stored = Element>
__device__ __forceinline__ void read_all(const Step& step, int index, uint32_t shared) {
  __shared__ int seen[kMaxRows];
  Tile tile;
  if (!find_tile(step, index, tile)) return;
  const Share share(step.layout, tile.blocks, blockIdx.x, gridDim.x);
  if (share.count <= 0) return;
  load_rows(step, tile, shared, seen);
  __syncthreads();
  const BlockRange range{share.first, share.count};
  Reader<Element, BlockRange, Stored>(step, tile, range, shared, seen).run();
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

template <class Element, class Stored = Element>
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
    Reader<Element, Listed, Stored>(step, tile, listed, shared, seen).run();
  }
}

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

// Every block that a row of tile `tile` sees.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_bf16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<__nv_bfloat16>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_fp16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<__half>(step, tile, shared_address(shared_bytes));
}

// Candidates and open blocks alone; the other cells stay.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_bf16(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<__nv_bfloat16>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_fp16(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<__half>(step, tile, shared_address(shared_bytes));
}

// The same over caches of e4m3.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_bf16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<__nv_bfloat16, compactattn::E4m3>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_bf16_e4m3(const __grid_constant__ compactattn::Step step,
                                                int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<__nv_bfloat16, compactattn::E4m3>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_fp16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<__half, compactattn::E4m3>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_fp16_e4m3(const __grid_constant__ compactattn::Step step,
                                                int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<__half, compactattn::E4m3>(step, tile, shared_address(shared_bytes));
}
