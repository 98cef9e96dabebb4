// attend, sm_90a, bf16, head_dim 128.
#include "../kernel.cuh"

using Tile = compactattn::sm90::TileOf<__nv_bfloat16, 128>;

extern "C" __global__ void __launch_bounds__(Tile::kThreads, 1)
    compactattn_attend_sm90_bf16_d128(const __grid_constant__ CUtensorMap q,
                                      const __grid_constant__ CUtensorMap k,
                                      const __grid_constant__ CUtensorMap v,
                                      const __grid_constant__ compactattn::AttendParams params) {
  compactattn::sm90::attend<Tile>({q, k, v}, params);
}

extern "C" __global__ void __launch_bounds__(Tile::kThreads, 1)
    compactattn_attend_sm90_bf16_d128_means(
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
        const __grid_constant__ CUtensorMap v,
        const __grid_constant__ compactattn::sm90::MeanTensors rows,
        const __grid_constant__ compactattn::AttendParams params,
        const __grid_constant__ compactattn::Means means) {
  const compactattn::sm90::MeanMaps mean{rows.k, rows.v, means};
  compactattn::sm90::attend<compactattn::sm90::Corrected<Tile>>({q, k, v}, params, &mean);
}
