// The attend kernel with one choice of its traits undone at a time, for timing only.
#include "../../cuda/attend/sm90/kernel.cuh"

namespace {
using namespace compactattn::sm90;
using Bf16 = __nv_bfloat16;

using D128 = TileOf<Bf16, 128>;
struct RescaleAlways : D128 {
  static constexpr float kRescaleAbove = 0.0f;
};
using TwoStages = Tile<Bf16, 128, 128, 2, 2, 8>;

using D64ThreeStages = Tile<Bf16, 64, 128, 3, 3, 4>;

using D256ThreeOfK = Tile<Bf16, 256, 64, 3, 2, 0>;
using D256TwoStages = Tile<Bf16, 256, 64, 2, 2, 0>;
using D256SomeQ = Tile<Bf16, 256, 64, 2, 3, 6>;
}  // namespace

#define VARIANT(name, Traits)                                                            \
  extern "C" __global__ void __launch_bounds__(Traits::kThreads, 1)                      \
      name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, \
           const __grid_constant__ CUtensorMap v,                                        \
           const __grid_constant__ compactattn::AttendParams params) {                   \
    compactattn::sm90::attend<Traits>({q, k, v}, params);                                \
  }

VARIANT(plain, D128)
VARIANT(rescale_always, RescaleAlways)
VARIANT(two_stages, TwoStages)
VARIANT(d64_three_stages, D64ThreeStages)
VARIANT(d256_three_of_k, D256ThreeOfK)
VARIANT(d256_two_stages, D256TwoStages)
VARIANT(d256_some_q, D256SomeQ)
