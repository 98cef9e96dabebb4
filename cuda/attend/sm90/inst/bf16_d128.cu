// attend, sm_90a, bf16, head_dim 128.
#include "../kernel.cuh"

extern "C" __global__ void __launch_bounds__(compactattn::sm90::Bf16D128::kThreads, 1)
    compactattn_attend_sm90_bf16_d128(const __grid_constant__ CUtensorMap q,
                                      const __grid_constant__ CUtensorMap k,
                                      const __grid_constant__ CUtensorMap v,
                                      const __grid_constant__ compactattn::AttendParams params) {
  compactattn::sm90::attend<compactattn::sm90::Bf16D128>({q, k, v}, params);
}
