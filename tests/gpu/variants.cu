// The attend kernel with one choice of its traits undone at a time, for timing only.
#include "../../cuda/attend/sm90/kernel.cuh"

namespace {
using compactattn::sm90::Bf16D128;

struct Plain : Bf16D128 {};
struct PlainWait : Bf16D128 {
  static constexpr bool kOrderedWait = false;
};
struct RescaleAlways : Bf16D128 {
  static constexpr float kRescaleAbove = 0.0f;
};
struct NoTurns : Bf16D128 {
  static constexpr bool kTakeTurns = false;
};
struct TwoStages : Bf16D128 {
  static constexpr int kStages = 2;
};
struct Queries : Bf16D128 {
  static constexpr bool kQueriesInRegisters = true;
};
struct QueriesPlainWait : PlainWait {
  static constexpr bool kQueriesInRegisters = true;
};
struct Queries240 : Queries {
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
};
struct PlainWaitNoTurns : PlainWait {
  static constexpr bool kTakeTurns = false;
};
}  // namespace

#define VARIANT(name, Traits)                                                                    \
  extern "C" __global__ void __launch_bounds__(Traits::kThreads, 1)                              \
  name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,             \
       const __grid_constant__ CUtensorMap v, const __grid_constant__ compactattn::AttendParams params) { \
    compactattn::sm90::attend<Traits>({q, k, v}, params);                                        \
  }

VARIANT(plain, Plain)
VARIANT(plain_wait, PlainWait)
VARIANT(rescale_always, RescaleAlways)
VARIANT(no_turns, NoTurns)
VARIANT(two_stages, TwoStages)
VARIANT(queries, Queries)
VARIANT(queries_plain_wait, QueriesPlainWait)
VARIANT(queries_240, Queries240)
VARIANT(plain_wait_no_turns, PlainWaitNoTurns)
