// select: cells by the blocks' keys, exact, as cells_read.cu, for a head_dim of 256 where a CTA may
// have 99 KiB of shared memory: compute capability 8.6, 8.9 and 12.0.
//
// Grid (any > 0, num_kv_heads, max_select_spans) x 128, 95,232 bytes of shared memory: one CTA fits
// an SM. Cells have the bits that cells_read.cu gives them.
#include "../cells_pieces.cuh"
#include "../cells_read.cuh"

namespace compactattn::select {
namespace {

template <class Element>
struct Pieced {
  template <class Source>
  using Reader = PiecedReader<Element, Source>;
};

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

// Every block that a row of tile `tile` sees.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 1)
    compactattn_cells_read_small_bf16_d256(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<Pieced<__nv_bfloat16>>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 1)
    compactattn_cells_read_small_fp16_d256(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<Pieced<__half>>(step, tile, shared_address(shared_bytes));
}

// Candidates and open blocks alone; the other cells stay.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 1)
    compactattn_cells_read_candidates_small_bf16_d256(
        const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<Pieced<__nv_bfloat16>>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 1)
    compactattn_cells_read_candidates_small_fp16_d256(
        const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<Pieced<__half>>(step, tile, shared_address(shared_bytes));
}
