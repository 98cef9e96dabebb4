// sample_rows.cu for clusters and groups of four heads of 128 dims at most: a thread's registers
// hold its candidates' queries, so each is loaded once, and the sums of a cluster's CTAs meet once.
// It works on the span that plan_spans is about to write, and again if another was written.
#define COMPACTATTN_CTA_THREADS 512
#include "foresee.cuh"
#include "sample_rows_chosen.cuh"

namespace compactattn::select {
namespace {

constexpr int kHeldRows = 2;
constexpr int kHeldSums = 512;  // of a group, at most: numbers
static_assert(kHeldRows * kWide / 16 >= kMostCandidates / kCtas, "all candidates of a CTA");
static_assert(4 * kHeldSums * (1 + kWide / 32 + kCtas) == sample_rows_held_bytes(), "a launch's");

// A row is a candidate of this CTA: rows `group`, `group` + `groups` .. are a thread's; zeros past
// the last.
struct Held {
  int4 parts[kHeldRows][kHeads];

  // Widened anew each time: twice the registers that the parts take would hold them.
  template <class E>
  __device__ __forceinline__ void widened(int row, int head, Part& x) const {
    const int4& part = parts[row][head];
    widen<E>({ptx::not_before(part.x), ptx::not_before(part.y), ptx::not_before(part.z),
              ptx::not_before(part.w)},
             x);
  }

  __device__ __forceinline__ explicit Held(const Unit& unit) {
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const int row = unit.group + r * unit.groups;
      const int token = unit.token(min(unit.first + row, unit.candidates - 1));
#pragma unroll
      for (int i = 0; i < kHeads; ++i)
        parts[r][i] = row < unit.count ? unit.load(token, i) : int4{};
    }
  }
};

// The scale of each head, by as many groups of lanes.
template <class E>
__device__ __forceinline__ void find_scales(const Unit& unit, float* scales) {
  if (unit.group < kHeads) {
    Part x;
    widen<E>(unit.load(0, unit.group), x);
    const float scale = scale_of(x, unit.lanes);
    if (unit.lane == 0) scales[unit.group] = scale;
  }
  __syncthreads();
}

// Eight numbers of a lane's, as fours that lie side by side with those of other lanes: this one's
// first four of a head among sums, and how far the others are.
__device__ __forceinline__ int first_four(const Unit& unit, int head) {
  return 4 * (2 * head * unit.lanes + unit.lane);
}
__device__ __forceinline__ int to_second(const Unit& unit) { return 4 * unit.lanes; }

// Each warp's sums of its rows, in units of the head's first candidate: [warps, sums].
template <class E>
__device__ __forceinline__ void add_held(const Unit& unit, const Held& held, const float* scales,
                                         int* of_warps) {
  int* own = of_warps + threadIdx.x / 32 * kHeldSums;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i >= unit.heads) break;
    const float scale = scales[i];
    int sum[kElements] = {};
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      Part x;
      held.template widened<E>(r, i, x);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum[e] += whole_number(x[e], scale);
    }
    for (int d = 16; d >= unit.lanes; d /= 2) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum[e] += __shfl_xor_sync(cta::kAllLanes, sum[e], d);
    }
    if (threadIdx.x % 32 >= unit.lanes) continue;
    int* to = own + first_four(unit, i);
    *reinterpret_cast<int4*>(to) = {sum[0], sum[1], sum[2], sum[3]};
    *reinterpret_cast<int4*>(to + to_second(unit)) = {sum[4], sum[5], sum[6], sum[7]};
  }
  __syncthreads();
}

// Of kMany sets of sums, one after the other, the sum of this thread's number.
template <int kMany>
__device__ __forceinline__ int sum_of(const int* sets) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kMany; ++i) sum += sets[i * kHeldSums + threadIdx.x];
  return sum;
}

// Gives this CTA's sums to all: [CTAs, sums]. All have arrived at the cluster's barrier once.
__device__ __forceinline__ void send_sums(const Unit& unit, const int* of_warps, int* of_ctas) {
  ptx::wait_for_cluster();
  if (static_cast<int>(threadIdx.x) < unit.sums()) {
    const int sum = sum_of<kWide / 32>(of_warps);
    int* own = of_ctas + cluster_rank() * kHeldSums + threadIdx.x;
    uint32_t* to = reinterpret_cast<uint32_t*>(own);
#pragma unroll
    for (int rank = 0; rank < kSharers; ++rank) ptx::store_to(rank, to, sum);
  }
  ptx::fence_cluster();
  __syncwarp();
  ptx::arrive_at_cluster();
}

// What all CTAs have sent, as floats.
__device__ __forceinline__ void receive_sums(const Unit& unit, const int* of_ctas, int* sums) {
  ptx::wait_for_cluster();
  if (static_cast<int>(threadIdx.x) < unit.sums())
    sums[threadIdx.x] = __float_as_int(__int2float_rn(sum_of<kSharers>(of_ctas)));
  __syncthreads();
}

// What even and odd ones of lanes kDistance apart have of one of two numbers.
template <int kDistance>
__device__ __forceinline__ float join_pair(float even, float odd) {
  const bool is_odd = threadIdx.x & kDistance;
  const float other = __shfl_xor_sync(cta::kAllLanes, is_odd ? even : odd, kDistance);
  return __fadd_rn(is_odd ? odd : even, other);
}

// Lane l gets the sum of number l / kDistance % kMany over the lanes of a vector, pair by pair as
// `dot` has it.
template <int kDistance, int kMany>
__device__ __forceinline__ float join_lanes(const float (&numbers)[kMany], int lanes) {
  if constexpr (kMany == 1) {
    float sum = numbers[0];
    for (int d = kDistance; d < lanes; d *= 2)
      sum = __fadd_rn(sum, __shfl_xor_sync(cta::kAllLanes, sum, d));
    return sum;
  } else {
    float sums[kMany / 2];
#pragma unroll
    for (int i = 0; i < kMany / 2; ++i)
      sums[i] = join_pair<kDistance>(numbers[2 * i], numbers[2 * i + 1]);
    return join_lanes<2 * kDistance>(sums, lanes);
  }
}

// For lane kHeads * r + i of eight, the sum over lanes of each(i, rows)[r]; heads two by two, for
// registers are short.
template <class Each>
__device__ __forceinline__ float sum_held(int lanes, Each each) {
  float pairs[kHeldRows * kHeads / 2];
#pragma unroll
  for (int i = 0; i < kHeads; i += 2) {
    float even[kHeldRows], odd[kHeldRows];
    each(i, even);
    each(i + 1, odd);
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) pairs[(r * kHeads + i) / 2] = join_pair<1>(even[r], odd[r]);
  }
  return join_lanes<2>(pairs, lanes);
}

// As add_held has them; of heads past the group's anything.
__device__ __forceinline__ void mean_of(const Unit& unit, const int* sums, int head, Part& mean) {
  const int* from = sums + first_four(unit, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int4 four = *reinterpret_cast<const int4*>(from + half * to_second(unit));
    mean[4 * half] = __int_as_float(four.x), mean[4 * half + 1] = __int_as_float(four.y);
    mean[4 * half + 2] = __int_as_float(four.z), mean[4 * half + 3] = __int_as_float(four.w);
  }
}

// Of head l % kHeads, for lane l.
__device__ __forceinline__ float square_of_mean(const Unit& unit, const int* sums) {
  float squares[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    Part mean;
    mean_of(unit, sums, i, mean);
    squares[i] = product_of(mean, mean);
  }
  return join_lanes<1>(squares, unit.lanes);
}

// How like the mean this CTA's candidates are. Lane kHeads * r + i of eight is row r's and head
// i's: roots and divisions of all at once. Waits for earlier kernels once queries are there, and
// runs `meanwhile()` while sums are on their way.
template <class E, class Meanwhile>
__device__ __forceinline__ void compare_held(const Unit& unit, int* dynamic, Picking& shared,
                                             Meanwhile meanwhile) {
  int *of_warps = dynamic + kHeldSums, *of_ctas = of_warps + kWide / 32 * kHeldSums;
  ptx::arrive_at_cluster();
  const Held held(unit);
  find_scales<E>(unit, shared.scales);
  ptx::wait_for_earlier();
  add_held<E>(unit, held, shared.scales, of_warps);
  send_sums(unit, of_warps, of_ctas);
  meanwhile();
  Part x;
  const float square = sum_held(unit.lanes, [&](int i, float (&rows)[kHeldRows]) {
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      held.template widened<E>(r, i, x);
      rows[r] = product_of(x, x);
    }
  });
  receive_sums(unit, of_ctas, dynamic);
  const float product = sum_held(unit.lanes, [&](int i, float (&rows)[kHeldRows]) {
    Part mean;
    mean_of(unit, dynamic, i, mean);
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      held.template widened<E>(r, i, x);
      rows[r] = product_of(x, mean);
    }
  });
  const float length = __fsqrt_rn(square_of_mean(unit, dynamic));
  const float mine = cosine(product, square, length);
  float likeness = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const float of_head = __shfl_sync(cta::kAllLanes, mine, i, kHeads);
    if (i < unit.heads) likeness = __fadd_rn(likeness, of_head);
  }
  const int r = unit.lane / kHeads, row = unit.group + r * unit.groups;
  if (unit.lane % kHeads == 0 && r < kHeldRows && row < unit.count)
    shared.keys[row] = ordered(likeness);
}

// Whether unusual tokens of the span are looked for.
__device__ __forceinline__ bool has_unusual(const Step& step, const Span& span) {
  const int count = samples_of(step, span, 0).count;
  return count < span.len && unusual_of(count) > 0;
}

template <class E>
__device__ __forceinline__ void sample_held(const Step& step) {
  extern __shared__ __align__(16) int dynamic[];
  __shared__ Picking shared;
  Planned planned;
  Span span;
  bool is_foreseen = foresee_span(step, blockIdx.z, span) && has_unusual(step, span);
  if (!is_foreseen) {
    planned.load(step);
    if (!planned.needs_samples(step)) return;
    span = planned.span;
  }
#pragma unroll 1
  while (has_unusual(step, span)) {
    compare_held<E>(Unit(step, span, blockIdx.y), dynamic, shared, [&] {
      if (is_foreseen) planned.load(step);
    });
    if (!is_foreseen) break;
    if (!planned.needs_samples(step)) return;
    is_foreseen = false;
    if (planned.span.q_start == span.q_start && planned.span.len == span.len) break;
    span = planned.span;
  }
  choose_samples(step, Unit(step, span, blockIdx.y), shared);
}

}  // namespace
}  // namespace compactattn::select

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(512, 2)
    compactattn_sample_rows_held_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_held<__nv_bfloat16>(step);
}

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(512, 2)
    compactattn_sample_rows_held_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::select::sample_held<__half>(step);
}
