// select: cells by mean keys where a row sees the whole block, by the keys of the one block that it
// sees in part (rust/select/pooled_mass.rs).
//
// Grid (ceil(max_blocks / 64) + tails, num_kv_heads, max_select_spans) x 128, shared memory as
// cells_read.cu. `tails` CTAs (any > 0) of a (span, KV head) share the blocks seen in part; of a
// span of n tokens ceil(n / 128) + 1 have work.
#include "cells_pool.cuh"

namespace compactattn::select {
namespace {

template <class Element, class Stored = Element>
struct Whole {
  template <class Source>
  using Reader = select::Reader<Element, Source, Stored>;

  static __device__ __forceinline__ uint32_t stages(const Step& step) {
    return kMaxRows * pitch_of(step.layout);
  }

  static __device__ __forceinline__ void begin_means(const Step& step, const PoolMeans& means,
                                                     char* shared) {
    means.template load<Element, 2>(shared + stages(step));
  }

  // Products of this warp's rows with the means.
  static __device__ __forceinline__ void multiply_means(float (&logits)[2][kPoolBlocks / 8][4],
                                                        const Step& step, const Tile& tile,
                                                        const PoolMeans&, char* shared) {
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
    if (warp_row >= tile.rows) return;
    const uint32_t queries = shared_address(shared);
    const uint32_t rows = queries + warp_row * pitch_of(step.layout);
    multiply<Element>(logits, rows, queries + stages(step), step.layout);
  }

  // Two vectors of the tiles give way to one row of cells, 256 bytes, whatever the head_dim.
  static __device__ __forceinline__ uint32_t cells_pitch(const Layout& layout) {
    return 2 * pitch_of(layout);
  }
};

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_bf16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::select::pool<compactattn::select::Whole<__nv_bfloat16>>(step, tile, shared_bytes);
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_fp16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::select::pool<compactattn::select::Whole<__half>>(step, tile, shared_bytes);
}

// The same over caches of e4m3.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_bf16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::select::pool<compactattn::select::Whole<__nv_bfloat16, compactattn::E4m3>>(
      step, tile, shared_bytes);
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_pool_fp16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::select::pool<compactattn::select::Whole<__half, compactattn::E4m3>>(step, tile,
                                                                                   shared_bytes);
}
