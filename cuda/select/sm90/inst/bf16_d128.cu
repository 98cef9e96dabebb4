// cells of sampled rows, sm_90a, bf16, head_dim 128.
#include "../kernel.cuh"

using Tile = compactattn::select::sm90::KeyTileOf<__nv_bfloat16, 128>;

// Every block that a row of tile `tile` sees.
extern "C" __global__ void __launch_bounds__(Tile::kThreads, 1)
    compactattn_cells_read_sm90_bf16_d128(const __grid_constant__ CUtensorMap k,
                                          const __grid_constant__ compactattn::Step step,
                                          int tile) {
  compactattn::select::sm90::read_cells<Tile, false>(k, step, tile);
}

// Candidates and open blocks alone; the other cells stay.
extern "C" __global__ void __launch_bounds__(Tile::kThreads, 1)
    compactattn_cells_read_candidates_sm90_bf16_d128(const __grid_constant__ CUtensorMap k,
                                                     const __grid_constant__ compactattn::Step step,
                                                     int tile) {
  compactattn::select::sm90::read_cells<Tile, true>(k, step, tile);
}

using Pair = compactattn::select::sm90::KeyTileOf<__nv_bfloat16, 128, 2>;

// As the first, each key once for two neighbouring select spans of a request.
extern "C" __global__ void __launch_bounds__(Pair::kThreads, 1)
    compactattn_cells_read_pairs_sm90_bf16_d128(const __grid_constant__ CUtensorMap k,
                                                const __grid_constant__ compactattn::Step step,
                                                int tile) {
  compactattn::select::sm90::read_cells<Pair, false>(k, step, tile);
}
