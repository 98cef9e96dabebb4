// combine: adds the pieces of each cut item, in the order of its tiles, so that every run gives the
// same bits.
#include "../common/math.cuh"
#include "../common/work.cuh"
#include "../ptx/grid.cuh"

namespace compactattn {
namespace {

// The slots of one cut item: the second of the CTA before the cut, then the first of each CTA that
// works on it.
struct Slots {
  int first_cta;
  int count;

  __device__ int operator[](int i) const {
    return i == 0 ? 2 * first_cta + 1 : 2 * (first_cta + i);
  }
};

// Past the first-level cache: it is read before the wait, which alone says what that cache holds.
__device__ Cut cut_at(const Work& work, int cut) {
  const int2 words = __ldcg(reinterpret_cast<const int2*>(work.cuts + cut));
  return {words.x, words.y};
}

// By a whole warp, a cut a lane: nearly always one look. The last cut is no item's.
__device__ Slots slots_of(const Work& work, int cut, int item) {
  const int lane = threadIdx.x % 32;
  int count = 2;
  for (;; count += 32) {
    const int next = cut + count - 1 + lane;
    const bool other = next > work.num_ctas || cut_at(work, next).item != item;
    const uint32_t others = __ballot_sync(0xffffffffu, other);
    if (others != 0) return {cut - 1, count + __ffs(others) - 1};
  }
}

__device__ void add(float4& sum, float weight, const float4& x) {
  sum.x += weight * x.x;
  sum.y += weight * x.y;
  sum.z += weight * x.z;
  sum.w += weight * x.w;
}

// One warp, one row: 4 columns a lane and turn.
template <class Element, int kHeadDim>
__device__ void combine_row(const AttendParams& params, const Slots& slots, int row, int64_t token,
                            int64_t head) {
  constexpr int kFours = kHeadDim / 4;
  constexpr int kTurns = (kFours + 31) / 32;
  const int lane = threadIdx.x % 32;
  const Results& results = params.results;
  float top = -INFINITY;
#pragma unroll 4
  for (int i = 0; i < slots.count; ++i)
    top = fmaxf(top, results.partial_lse[slots[i] * kTileRows + row]);
  float4 sum[kTurns] = {};
  float weights = 0;
#pragma unroll 2
  for (int i = 0; i < slots.count; ++i) {
    const int64_t at = static_cast<int64_t>(slots[i]) * kTileRows + row;
    const float lse = results.partial_lse[at];
    const float weight = lse == -INFINITY ? 0.0f : ptx::exp2_approx((lse - top) * kLog2E);
    const float4* out = reinterpret_cast<const float4*>(results.partial_out + at * kHeadDim);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (32 * turn + lane < kFours) add(sum[turn], weight, out[32 * turn + lane]);
    }
    weights += weight;
  }
  const float inverse = weights > 0 ? 1 / weights : 0;
  uint8_t* out = static_cast<uint8_t*>(results.out) +
                 2 * (token * results.out_token_stride + head * results.out_head_stride);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const float4& x = sum[turn];
    if (32 * turn + lane >= kFours) continue;
    reinterpret_cast<uint2*>(out)[32 * turn + lane] = {
        pack_pair<Element>(x.x * inverse, x.y * inverse),
        pack_pair<Element>(x.z * inverse, x.w * inverse)};
  }
  if (lane == 0 && results.lse != nullptr) {
    const float lse = weights > 0 ? top + kLn2 * __log2f(weights) : -INFINITY;
    results.lse[token * results.lse_token_stride + head * results.lse_head_stride] = lse;
  }
}

// CTAs (num_ctas - 1, any): a warp for each row in turn of the item that cut blockIdx.x + 1 is the
// first to divide. Cuts are plan's and can be read before the wait: all of attend had begun when
// this kernel did, and plan had ended when attend did.
template <class Element, int kHeadDim>
__device__ void combine(const AttendParams& params) {
  const int cut = blockIdx.x + 1;
  const Cut before = cut_at(params.work, cut - 1), mine = cut_at(params.work, cut);
  const bool is_first = mine.tiles > 0 && (before.item != mine.item || before.tiles == 0);
  const Slots slots = is_first ? slots_of(params.work, cut, mine.item) : Slots{};
  ptx::wait_for_earlier();
  if (!is_first) return;
  const WorkItem item = params.work.items[mine.item];
  const int step = gridDim.y * 8;
  for (int row = blockIdx.y * 8 + threadIdx.x / 32; row < kTileRows; row += step) {
    const QueryRow place = query_row(item, params.work.heads_per_list, row);
    if (!place.used) continue;
    combine_row<Element, kHeadDim>(params, slots, row, item.q_token + place.token,
                                   item.q_head + place.head);
  }
}

}  // namespace
}  // namespace compactattn

#define COMBINE(name, Element, kHeadDim)                               \
  extern "C" __global__ void __launch_bounds__(256)                    \
      name(const __grid_constant__ compactattn::AttendParams params) { \
    compactattn::combine<Element, kHeadDim>(params);                   \
  }

COMBINE(compactattn_combine_bf16_d64, __nv_bfloat16, 64)
COMBINE(compactattn_combine_bf16_d96, __nv_bfloat16, 96)
COMBINE(compactattn_combine_bf16_d128, __nv_bfloat16, 128)
COMBINE(compactattn_combine_bf16_d256, __nv_bfloat16, 256)
COMBINE(compactattn_combine_fp16_d64, __half, 64)
COMBINE(compactattn_combine_fp16_d96, __half, 96)
COMBINE(compactattn_combine_fp16_d128, __half, 128)
COMBINE(compactattn_combine_fp16_d256, __half, 256)
