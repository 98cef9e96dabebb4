// select, and union and table after it: from cells in global memory (cells_read) to scores and
// lists.
//
// Dynamic shared memory: 128 rows of `pitch` floats, and no less than the kernels that keep.
#include "cluster.cuh"

namespace compactattn::select {
namespace {

constexpr int kRowsAtOnce = 8;  // of a warp: loads under way
constexpr int kLoads = 4;       // of a lane and row

// A slice's cells in global memory: rows of its first columns, `stride` apart.
struct Source {
  const float* cells;
  int64_t stride;
};

// Columns `first` .. of `kRowsAtOnce` rows into the slice and the rows' weights; by one warp.
__device__ __forceinline__ void load_columns(const Tile& tile, const Slice& slice,
                                             const Source& source, int row, int first,
                                             Weight (&weights)[kRowsAtOnce]) {
  const int lane = threadIdx.x % 32;
  float x[kRowsAtOnce][kLoads];
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int j = first + lane + 32 * i;
      const bool exists = row + r < tile.rows && j < slice.count;
      x[r][i] = exists ? source.cells[(row + r) * source.stride + j] : -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    Weight& weight = weights[r];
    float top = weight.max;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) top = fmaxf(top, x[r][i]);
    weight.sum *= ptx::exp2_approx(weight.max - top);
    weight.max = top;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int j = first + lane + 32 * i;
      weight.sum += ptx::exp2_approx(x[r][i] - top);
      if (row + r < tile.rows && j < slice.count) {
        slice.cells[(row + r) * slice.pitch + j] = x[r][i];
      }
    }
  }
}

__device__ __forceinline__ void load_cells(const Step& step, const Tile& tile, const Slice& slice,
                                           Exchange& exchange) {
  const Source source{tile.cells + slice.first, step.layout.max_blocks};
  for (int row = threadIdx.x / 32 * kRowsAtOnce; row < kMaxRows; row += kWide / 32 * kRowsAtOnce) {
    Weight weights[kRowsAtOnce];
#pragma unroll
    for (Weight& weight : weights) weight.clear();
    for (int first = 0; first < slice.count; first += 32 * kLoads) {
      load_columns(tile, slice, source, row, first, weights);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      Weight weight = weights[r];
      for (int d = 16; d > 0; d /= 2) {
        weight.merge({__shfl_xor_sync(0xffffffffu, weight.max, d),
                      __shfl_xor_sync(0xffffffffu, weight.sum, d)});
      }
      if (threadIdx.x % 32 == 0) {
        exchange.parts[0][row + r] = weight;
        exchange.parts[1][row + r].clear();
      }
    }
  }
}

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(256, 1)
    compactattn_cells_lists(const __grid_constant__ compactattn::Step step,
                            const __grid_constant__ compactattn::select::Wish wish) {
  using namespace compactattn::select;
  compactattn::ptx::wait_for_earlier();
  score(step, wish, shared_bytes, [&](const Tile& tile, const Slice& slice, Exchange& exchange) {
    load_cells(step, tile, slice, exchange);
  });
}
