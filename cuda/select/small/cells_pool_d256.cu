// select: cells by mean keys, as cells_pool.cu, for a head_dim of 256 where a CTA may have 99 KiB
// of shared memory: compute capability 8.6, 8.9 and 12.0.
//
// Grid as cells_pool.cu x 128, shared memory as cells_read_d256.cu. Cells have the bits that
// cells_pool.cu gives them.
#include "../cells_pieces.cuh"
#include "../cells_pool.cuh"

namespace compactattn::select {
namespace {

template <class Element>
struct Pieced {
  template <class Source>
  using Reader = PiecedReader<Element, Source>;

  static __device__ __forceinline__ void begin_means(const Step&, const PoolMeans&, char*) {}

  // A quarter of the dims of all means at a time.
  static __device__ __forceinline__ void multiply_means(float (&logits)[2][kPoolBlocks / 8][4],
                                                        const Step& step, const Tile& tile,
                                                        const PoolMeans& means, char* shared) {
    constexpr uint32_t kStages = kMaxRows * row_bytes(256);
    const uint32_t queries = shared_address(shared);
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
#pragma unroll 1
    for (int dim = 0; dim < 256; dim += kPieceDims) {
      __syncthreads();
      means.template load<Element, 2, kPieceDims>(shared + kStages, dim);
      __syncthreads();
      if (warp_row >= tile.rows) continue;
      const uint32_t rows = queries + warp_row * row_bytes(256) + 2 * dim;
      multiply_dim<Element, kPoolBlocks / 8, kPieceDims, 256>(logits, rows, queries + kStages);
    }
  }

  // A row of cells is 256 bytes.
  static __device__ __forceinline__ uint32_t cells_pitch(const Layout&) {
    return 2 * row_bytes(kPieceDims);
  }
};

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 1)
    compactattn_cells_pool_small_bf16_d256(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  using namespace compactattn::select;
  pool<Pieced<__nv_bfloat16>>(step, tile, shared_bytes);
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 1)
    compactattn_cells_pool_small_fp16_d256(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  using namespace compactattn::select;
  pool<Pieced<__half>>(step, tile, shared_bytes);
}
