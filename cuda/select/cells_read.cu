// select: cells by the blocks' keys, exact (rust/select/cells.rs, Cells::read).
//
// A launch streams the keys of its blocks once and serves one tile of sampled rows of every (select
// span, KV head): grid (any > 0, num_kv_heads, max_select_spans) x 128, 320 * (2 * head_dim + 16)
// bytes of shared memory (256 * (2 * head_dim + 16) for head_dim 256). CTAs x of a (span, KV head)
// share its chunks; what a cell holds does not depend on how many there are.
#include "cells.cuh"

namespace compactattn::select {
namespace {

// Tokens that a CTA reads between two looks at the grid: many enough to repay loading the rows, few
// enough to fill a GPU at 32k tokens and 8 KV heads.
constexpr int kChunkTokens = 1024;
// Of those, only candidates are read.
constexpr int kCandidateChunkTokens = 4096;
constexpr int kMaxListed = kCandidateChunkTokens / 16;

// Blocks of a list, every cell.
struct Listed {
  const int* blocks;
  int count;
  __device__ __forceinline__ int block(int i) const { return blocks[i]; }
  __device__ __forceinline__ bool writes(int, int, int) const { return true; }
};

template <class Element>
__device__ __forceinline__ void read_all(const Step& step, int index, uint32_t shared) {
  __shared__ int seen[kMaxRows];
  Tile tile;
  if (!find_tile(step, index, tile)) return;
  const int each = kChunkTokens >> step.layout.log2_block_tokens;
  BlockRange range{static_cast<int>(blockIdx.x) * each, each};
  if (range.first >= tile.blocks) return;
  load_rows(step, tile, shared, seen);
  __syncthreads();
  Reader<Element, BlockRange> reader(step, tile, range, shared, seen);
  for (; range.first < tile.blocks; range.first += gridDim.x * each) {
    range.count = min(each, tile.blocks - range.first);
    reader.run();
  }
}

// Candidates and open blocks among `each` blocks from `first` on, ascending, in `list`; how many.
// Called by the whole CTA.
__device__ int list_candidates(const Step& step, const Tile& tile, int first,
                               int (&list)[kMaxListed]) {
  __shared__ int warps[kThreads / 32];
  const int each = kCandidateChunkTokens >> step.layout.log2_block_tokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int past = past_blocks(step.layout, tile.span);
  const uint32_t* bits = candidates_of(step, blockIdx.z, tile.kv_head);
  int count = 0;
  for (int from = 0; from < each; from += kThreads) {
    const int block = first + from + threadIdx.x;
    const bool inside = from + static_cast<int>(threadIdx.x) < each && block < tile.blocks;
    const bool wanted = inside && (block >= past || (bits[block / 32] >> block % 32 & 1));
    const uint32_t votes = __ballot_sync(0xffffffffu, wanted);
    if (lane == 0) warps[warp] = __popc(votes);
    __syncthreads();
    int at = count + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) at += warps[w];
      count += warps[w];
    }
    if (wanted) list[at] = block;
    __syncthreads();
  }
  return count;
}

template <class Element>
__device__ __forceinline__ void read_candidates(const Step& step, int index, uint32_t shared) {
  __shared__ int seen[kMaxRows];
  __shared__ int list[kMaxListed];
  Tile tile;
  if (!find_tile(step, index, tile)) return;
  const int each = kCandidateChunkTokens >> step.layout.log2_block_tokens;
  int first = static_cast<int>(blockIdx.x) * each;
  if (first >= tile.blocks) return;
  load_rows(step, tile, shared, seen);
  __syncthreads();
  Listed listed{list, 0};
  Reader<Element, Listed> reader(step, tile, listed, shared, seen);
  for (; first < tile.blocks; first += gridDim.x * each) {
    listed.count = list_candidates(step, tile, first, list);
    reader.run();
  }
}

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

// Every block that a row of tile `tile` sees.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 2)
    compactattn_cells_read_bf16(const __grid_constant__ compactattn::Step step, int tile) {
  using namespace compactattn::select;
  read_all<__nv_bfloat16>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 2)
    compactattn_cells_read_fp16(const __grid_constant__ compactattn::Step step, int tile) {
  using namespace compactattn::select;
  read_all<__half>(step, tile, shared_address(shared_bytes));
}

// Candidates and open blocks alone; the other cells stay.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 2)
    compactattn_cells_read_candidates_bf16(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  using namespace compactattn::select;
  read_candidates<__nv_bfloat16>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 2)
    compactattn_cells_read_candidates_fp16(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  using namespace compactattn::select;
  read_candidates<__half>(step, tile, shared_address(shared_bytes));
}
