// The attend kernel with one choice of its traits undone at a time, for timing only.
#include "../../cuda/attend/sm90/kernel.cuh"

namespace {
using namespace compactattn::sm90;
using Bf16 = __nv_bfloat16;

template <class T, bool kAhead_, bool kHeldWait_, bool kTurns_>
struct With : T {
  static constexpr bool kAhead = kAhead_;
  static constexpr bool kHeldWait = kHeldWait_;
  static constexpr bool kTurns = kTurns_;
};

using D64 = TileOf<Bf16, 64>;
using D64Neither = With<D64, false, false, false>;
using D64Ahead = With<D64, true, false, false>;
using D64Held = With<D64, true, true, false>;
using D64HeldTurns = With<D64, true, true, true>;
using D64ThreeStages = With<Tile<Bf16, 64, 128, 3, 3, 4>, true, false, true>;

using D128 = TileOf<Bf16, 128>;
using D128Neither = With<D128, false, false, false>;
using D128Ahead = With<D128, true, false, false>;
using D128HeldTurns = With<D128, true, true, true>;
struct RescaleAlways : D128Neither {
  static constexpr float kRescaleAbove = 0.0f;
};
using TwoStages = With<Tile<Bf16, 128, 128, 2, 2, 8>, true, true, false>;

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

VARIANT(d64_neither, D64Neither)
VARIANT(d64_ahead, D64Ahead)
VARIANT(d64_held, D64Held)
VARIANT(d64_held_turns, D64HeldTurns)
VARIANT(d64_three_stages, D64ThreeStages)
VARIANT(neither, D128Neither)
VARIANT(ahead, D128Ahead)
VARIANT(held_turns, D128HeldTurns)
VARIANT(rescale_always, RescaleAlways)
VARIANT(two_stages, TwoStages)
VARIANT(d256_three_of_k, D256ThreeOfK)
VARIANT(d256_two_stages, D256TwoStages)
VARIANT(d256_some_q, D256SomeQ)
