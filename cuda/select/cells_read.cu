// select: cells by the blocks' keys, exact (rust/select/cells.rs, Cells::read).
//
// A launch streams the keys of its blocks once and serves one tile of sampled rows of every (select
// span, KV head): grid (any > 0, num_kv_heads, max_select_spans) x 128, 256 * (2 * head_dim + 16)
// bytes of shared memory. CTAs of a (span, KV head) share its blocks evenly; 3 fit an SM, so about
// 3 * SMs / num_kv_heads of them fill a GPU. What a cell holds does not depend on how many there
// are.
#include "cells_read.cuh"

namespace compactattn::select {
namespace {

template <class Element, class Stored = Element>
struct Whole {
  template <class Source>
  using Reader = select::Reader<Element, Source, Stored>;
};

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

// Every block that a row of tile `tile` sees.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_bf16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<Whole<__nv_bfloat16>>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_fp16(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<Whole<__half>>(step, tile, shared_address(shared_bytes));
}

// Candidates and open blocks alone; the other cells stay.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_bf16(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<Whole<__nv_bfloat16>>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_fp16(const __grid_constant__ compactattn::Step step,
                                           int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<Whole<__half>>(step, tile, shared_address(shared_bytes));
}

// The same over caches of e4m3.
extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_bf16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<Whole<__nv_bfloat16, compactattn::E4m3>>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_bf16_e4m3(const __grid_constant__ compactattn::Step step,
                                                int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<Whole<__nv_bfloat16, compactattn::E4m3>>(step, tile,
                                                           shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_fp16_e4m3(const __grid_constant__ compactattn::Step step, int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_all<Whole<__half, compactattn::E4m3>>(step, tile, shared_address(shared_bytes));
}

extern "C" __global__ void __launch_bounds__(compactattn::select::kThreads, 3)
    compactattn_cells_read_candidates_fp16_e4m3(const __grid_constant__ compactattn::Step step,
                                                int tile) {
  compactattn::ptx::wait_for_earlier();
  using namespace compactattn::select;
  read_candidates<Whole<__half, compactattn::E4m3>>(step, tile, shared_address(shared_bytes));
}
