// combine: adds the pieces of each cut item, in the order of its tiles, so that every run gives the
// same bits.
#include "../common/math.cuh"
#include "../common/work.cuh"

namespace compactattn {
namespace {

constexpr int kHeadDim = 128;

// The slots of one cut item: the second of the CTA before the cut, then the first of each CTA that
// works on it.
struct Slots {
  int first_cta;
  int count;

  __device__ int operator[](int i) const {
    return i == 0 ? 2 * first_cta + 1 : 2 * (first_cta + i);
  }
};

__device__ Slots slots_of(const Work& work, int cut) {
  int count = 2;
  while (work.cuts[cut + count - 1].item == work.cuts[cut].item) ++count;
  return {cut - 1, count};
}

// One warp, one row: 4 columns a lane.
template <class Element>
__device__ void combine_row(const AttendParams& params, const Slots& slots, const WorkItem& item,
                            int row) {
  const int lane = threadIdx.x % 32, group = params.work.group;
  const Results& results = params.results;
  float top = -INFINITY;
  for (int i = 0; i < slots.count; ++i)
    top = fmaxf(top, results.partial_lse[slots[i] * kTileRows + row]);
  float4 sum = {0, 0, 0, 0};
  float weights = 0;
  for (int i = 0; i < slots.count; ++i) {
    const int64_t at = static_cast<int64_t>(slots[i]) * kTileRows + row;
    const float lse = results.partial_lse[at];
    const float weight = lse == -INFINITY ? 0.0f : ptx::exp2_approx((lse - top) * kLog2E);
    const float4 out = reinterpret_cast<const float4*>(results.partial_out + at * kHeadDim)[lane];
    sum.x += weight * out.x;
    sum.y += weight * out.y;
    sum.z += weight * out.z;
    sum.w += weight * out.w;
    weights += weight;
  }
  const float inverse = weights > 0 ? 1 / weights : 0;
  const int64_t token = item.q_token + row / group, head = item.q_head + row % group;
  uint8_t* out = static_cast<uint8_t*>(results.out) +
                 2 * (token * results.out_token_stride + head * results.out_head_stride);
  reinterpret_cast<uint2*>(out)[lane] = {pack_pair<Element>(sum.x * inverse, sum.y * inverse),
                                         pack_pair<Element>(sum.z * inverse, sum.w * inverse)};
  if (lane == 0 && results.lse != nullptr) {
    const float lse = weights > 0 ? top + kLn2 * __log2f(weights) : -INFINITY;
    results.lse[token * results.lse_token_stride + head * results.lse_head_stride] = lse;
  }
}

// CTAs (num_ctas - 1, 16): a warp for each row of the item that cut blockIdx.x + 1 is the first to
// divide.
template <class Element>
__device__ void combine(const AttendParams& params) {
  const int cut = blockIdx.x + 1;
  const Cut* cuts = params.work.cuts;
  if (cuts[cut].tiles == 0) return;
  if (cuts[cut - 1].item == cuts[cut].item && cuts[cut - 1].tiles > 0) return;
  const WorkItem item = params.work.items[cuts[cut].item];
  const int row = blockIdx.y * 8 + threadIdx.x / 32;
  if (row >= item.num_tokens * params.work.group) return;
  combine_row<Element>(params, slots_of(params.work, cut), item, row);
}

}  // namespace
}  // namespace compactattn

extern "C" __global__ void __launch_bounds__(256)
    compactattn_combine_bf16_d128(const __grid_constant__ compactattn::AttendParams params) {
  compactattn::combine<__nv_bfloat16>(params);
}

extern "C" __global__ void __launch_bounds__(256)
    compactattn_combine_fp16_d128(const __grid_constant__ compactattn::AttendParams params) {
  compactattn::combine<__half>(params);
}
