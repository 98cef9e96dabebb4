// attend, sm_80 and later, bf16 over a cache of e4m3, head_dim 64.
#include "../kernel.cuh"

namespace {
using Tile = compactattn::sm80::OverE4m3<compactattn::sm80::TileOf<__nv_bfloat16, 64>>;
}

extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    compactattn_attend_sm80_bf16_e4m3_d64(
        const __grid_constant__ compactattn::AttendParams params) {
  compactattn::sm80::attend<Tile>(params);
}

extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    compactattn_attend_sm80_bf16_e4m3_d64_means(
        const __grid_constant__ compactattn::AttendParams params,
        const __grid_constant__ compactattn::Means means) {
  compactattn::sm80::attend<compactattn::sm80::Corrected<Tile>>(params, &means);
}
