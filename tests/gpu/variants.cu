// The attend kernel with one choice of its traits undone at a time, for timing only.
#include "../../cuda/attend/sm90/kernel.cuh"

namespace {
using compactattn::sm90::Bf16D128;

struct Plain : Bf16D128 {};
struct RescaleAlways : Bf16D128 {
  static constexpr float kRescaleAbove = 0.0f;
};
struct TwoStages : Bf16D128 {
  static constexpr int kStages = 2;
};
}  // namespace

#define VARIANT(name, Traits)                                                            \
  extern "C" __global__ void __launch_bounds__(Traits::kThreads, 1)                      \
      name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, \
           const __grid_constant__ CUtensorMap v,                                        \
           const __grid_constant__ compactattn::AttendParams params) {                   \
    compactattn::sm90::attend<Traits>({q, k, v}, params);                                \
  }

VARIANT(plain, Plain)
VARIANT(rescale_always, RescaleAlways)
VARIANT(two_stages, TwoStages)
