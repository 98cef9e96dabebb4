// The best of a row by count or by mass, without sorting: radix select over ranks, 8 bits a step or
// as many as make a bin for each thread, until a bin has few blocks.
//
// Ranks that many scores share cost nothing, as undecided bits start below the first bit in which
// the best and the worst rank differ. Every sum is one of integers, so a row's cut depends on the
// row alone.
#pragma once

#include <climits>
#include <cstdint>

#include "../common/cta.cuh"
#include "rank.cuh"

namespace compactattn {

constexpr int kDigitBits = cta::kThreads == 1024 ? 10 : cta::kThreads == 512 ? 9 : 8;
constexpr int kBins = 1 << kDigitBits;
static_assert(kBins == cta::kThreads, "a thread for each bin");
constexpr int kAllTies = INT_MAX;
constexpr int kBatch = 4;  // scores a thread loads at once
constexpr int kSlotBits = 7;
constexpr int kFew = 1 << kSlotBits;  // blocks that are compared each with each
static_assert(kSlotBits <= kDigitBits, "a key is what a step leaves open of a rank, and a slot");

// The blocks that rank above `rank`, and the first `ties` of those that rank equal (kAllTies: all).
struct Best {
  uint32_t rank;
  int ties;
  int count;  // blocks above and ties
};

constexpr Best kNothing{0xfffffffeu, 0, 0};  // above every rank

// Blocks begin..end of a row whose ranks equal `rank` above the `open_bits` lowest bits.
struct Range {
  const float* scores;
  int begin;
  int end;
  uint32_t rank;  // 0 in its open bits
  int open_bits;

  __device__ bool has(uint32_t other) const {
    return static_cast<uint64_t>(other ^ rank) >> open_bits == 0;
  }
};

// What came of one step: the bin in which the goal is reached.
struct Pick {
  int bin;
  int blocks;
  int blocks_above;
  uint64_t weight_above;
};

// Blocks and weight per digit; in shared memory, its bins zero between steps. The last step of few
// blocks has their keys and weights in place of the bins.
struct Histogram {
  alignas(16) uint32_t blocks[kBins];
  alignas(16) uint32_t low[kBins];
  alignas(16) uint32_t high[kBins];
  uint32_t aside[2];  // weight, low and high, of blocks beside the range
  uint32_t few;
  uint32_t warp_blocks[cta::kWarps];
  uint64_t warp_weights[cta::kWarps];
  Pick pick;
};

// The CTA's one; a call's first writes are to bins, `aside` and `few`, which all have read before
// the last barrier of the call before.
__device__ __forceinline__ Histogram& cta_histogram() {
  __shared__ Histogram histogram;
  return histogram;
}

// Each block weighs 1.
struct ByCount {
  static constexpr bool kIsCount = true;
  uint64_t count;
  __device__ uint64_t of(float) const { return 1; }
  __device__ void set_aside(Histogram&) const {}
  __device__ uint64_t goal(const Histogram&, uint64_t) const { return count; }
};

// visit(j, score) for blocks begin .. end; loads run ahead of what is done with them.
template <class Visit>
__device__ __forceinline__ void each_score(const float* scores, int begin, int end, Visit visit) {
#pragma unroll 1
  for (int first = begin + threadIdx.x; first < end; first += kBatch * cta::kThreads) {
    float batch[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int j = first + u * cta::kThreads;
      batch[u] = j < end ? scores[j] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int j = first + u * cta::kThreads;
      if (j < end) visit(j, batch[u]);
    }
  }
}

// 64 bits by two atomics of 32: whoever makes the low word wrap carries.
__device__ __forceinline__ void add_weight(uint32_t& low, uint32_t& high, uint64_t weight) {
  const uint32_t more = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&low, more);
  const uint32_t carried = static_cast<uint32_t>(weight >> 32) + (before + more < before);
  if (carried > 0) atomicAdd(&high, carried);
}

template <class Weight>
__device__ __forceinline__ void fill_bins(Histogram& histogram, const Range& range, int shift,
                                          const Weight& weight) {
  each_score(range.scores, range.begin, range.end, [&](int, float score) {
    const uint32_t rank = rank_of(score);
    if (!range.has(rank)) return;
    const int bin = (rank >> shift) % kBins;
    atomicAdd(&histogram.blocks[bin], 1u);
    if constexpr (!Weight::kIsCount) {
      add_weight(histogram.low[bin], histogram.high[bin], weight.of(score));
    }
  });
  __syncthreads();
}

// Blocks and weight of a thread's bin, and over the better bins; takes them out of the histogram.
struct Bin {
  uint32_t blocks;
  uint32_t blocks_above;
  uint64_t weight;
  uint64_t weight_above;
  uint64_t all;  // weight of all bins
};

template <class Weight>
__device__ __forceinline__ Bin sum_bins(Histogram& histogram) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at = kBins - 1 - static_cast<int>(threadIdx.x);
  Bin bin{histogram.blocks[at], 0, 0, 0, 0};
  bin.weight = Weight::kIsCount
                   ? bin.blocks
                   : static_cast<uint64_t>(histogram.high[at]) << 32 | histogram.low[at];
  histogram.blocks[at] = histogram.low[at] = histogram.high[at] = 0;
  const uint32_t blocks = cta::lane_sum<32>(bin.blocks);
  const uint64_t weight = Weight::kIsCount ? blocks : cta::lane_sum<32>(bin.weight);
  if (lane == 31) histogram.warp_blocks[warp] = blocks;
  if (lane == 31) histogram.warp_weights[warp] = weight;
  __syncthreads();
  const cta::Sum<uint32_t> of_blocks = cta::sum_of_warps(histogram.warp_blocks);
  const cta::Sum<uint64_t> of_weights = Weight::kIsCount
                                            ? cta::Sum<uint64_t>{of_blocks.before, of_blocks.total}
                                            : cta::sum_of_warps(histogram.warp_weights);
  bin.blocks_above = of_blocks.before + blocks - bin.blocks;
  bin.weight_above = of_weights.before + weight - bin.weight;
  bin.all = of_weights.total;
  return bin;
}

// The bin in which the weight from the best one on reaches `goal`, 1 .. weight of all bins.
__device__ __forceinline__ Pick pick_bin(Histogram& histogram, const Bin& bin, uint64_t goal) {
  if (bin.weight_above < goal && goal <= bin.weight_above + bin.weight) {
    histogram.pick = {kBins - 1 - static_cast<int>(threadIdx.x), static_cast<int>(bin.blocks),
                      static_cast<int>(bin.blocks_above), bin.weight_above};
  }
  __syncthreads();
  return histogram.pick;
}

// Keys of the few blocks of `range`, no two the same, that ascend with their ranks; after them keys
// and weights stay 0.
template <class Weight>
__device__ __forceinline__ void gather_few(Histogram& histogram, const Range& range,
                                           const Weight& weight) {
  each_score(range.scores, range.begin, range.end, [&](int, float score) {
    const uint32_t rank = rank_of(score);
    if (!range.has(rank)) return;
    const uint32_t slot = atomicAdd(&histogram.few, 1u);
    histogram.blocks[slot] = (rank ^ range.rank) << kSlotBits | slot;
    if constexpr (!Weight::kIsCount) {
      const uint64_t weighs = weight.of(score);
      histogram.low[slot] = static_cast<uint32_t>(weighs);
      histogram.high[slot] = static_cast<uint32_t>(weighs >> 32);
    }
  });
  __syncthreads();
}

// Blocks with higher keys, and their weight.
struct Better {
  uint32_t blocks;
  uint64_t weight;

  __device__ __forceinline__ void add(bool is_better, uint32_t low, uint32_t high) {
    if (is_better) ++blocks, weight += static_cast<uint64_t>(high) << 32 | low;
  }
};

// Of the few blocks, by as many threads side by side as there are for each, four keys at a time.
template <class Weight>
__device__ __forceinline__ Better better_than(const Histogram& histogram, uint32_t key, int few) {
  constexpr int kSideBySide = cta::kThreads / kFew;
  const auto four = [](const uint32_t* words, int j) {
    return *reinterpret_cast<const uint4*>(words + j);
  };
  Better all{0, 0};
#pragma unroll 1
  for (int j = threadIdx.x % kSideBySide * 4; j < few; j += 4 * kSideBySide) {
    const uint4 keys = four(histogram.blocks, j);
    uint4 low{}, high{};
    if constexpr (!Weight::kIsCount) low = four(histogram.low, j), high = four(histogram.high, j);
    all.add(keys.x > key, low.x, high.x);
    all.add(keys.y > key, low.y, high.y);
    all.add(keys.z > key, low.z, high.z);
    all.add(keys.w > key, low.w, high.w);
  }
#pragma unroll
  for (int d = 1; d < kSideBySide; d *= 2) {
    all.blocks += __shfl_xor_sync(cta::kAllLanes, all.blocks, d);
    if constexpr (!Weight::kIsCount) all.weight += __shfl_xor_sync(cta::kAllLanes, all.weight, d);
  }
  if constexpr (Weight::kIsCount) all.weight = all.blocks;
  return all;
}

// The best of the few blocks of `range` that reach `goal`, 1 .. their weight; `count` blocks rank
// above them. In place of all steps that are left.
template <class Weight>
__device__ __forceinline__ Best best_of_few(Histogram& histogram, const Range& range,
                                            const Weight& weight, uint64_t goal, int count) {
  gather_few(histogram, range, weight);
  const int few = static_cast<int>(histogram.few), slot = threadIdx.x * kFew / cta::kThreads;
  const uint32_t key = histogram.blocks[slot];
  const Better better = better_than<Weight>(histogram, key, few);
  const uint64_t own =
      Weight::kIsCount ? 1
                       : static_cast<uint64_t>(histogram.high[slot]) << 32 | histogram.low[slot];
  const bool is_mine = slot < few && threadIdx.x % (cta::kThreads / kFew) == 0;
  if (is_mine && better.weight < goal && goal <= better.weight + own) {
    histogram.pick = {static_cast<int>(key), 1, static_cast<int>(better.blocks), better.weight};
  }
  __syncthreads();
  const uint32_t last = static_cast<uint32_t>(histogram.pick.bin);
  const uint32_t rank = range.rank | last >> kSlotBits;
  count += histogram.pick.blocks_above + 1;
  // Blocks of one rank weigh the same, so it is no matter which of them has which slot.
  const bool is_tie = is_mine && (key ^ last) >> kSlotBits == 0;
  if (!__syncthreads_or(is_tie && key < last)) return {rank, kAllTies, count};
  return {rank, __syncthreads_count(is_tie && key >= last), count};
}

// The fewest best blocks of `range` that reach the goal that `weight` sets once the weight of the
// range is known, at most that; none for 0.
template <class Weight>
__device__ Best best_of(Range range, const Weight& weight) {
  Histogram& histogram = cta_histogram();
  histogram.blocks[threadIdx.x] = histogram.low[threadIdx.x] = histogram.high[threadIdx.x] = 0;
  if (threadIdx.x < 2) histogram.aside[threadIdx.x] = 0;
  if (threadIdx.x == 0) histogram.few = 0;
  __syncthreads();
  weight.set_aside(histogram);
  int count = 0;
  uint64_t goal = 0;
  for (bool first = true; first || range.open_bits > 0; first = false) {
    const int shift = max(0, range.open_bits - kDigitBits);
    fill_bins(histogram, range, shift, weight);
    const Bin bin = sum_bins<Weight>(histogram);
    if (first) goal = weight.goal(histogram, bin.all);
    if (goal == 0) {
      // Whoever calls next clears what others may still be reading.
      __syncthreads();
      return kNothing;
    }
    const Pick pick = pick_bin(histogram, bin, goal);
    goal -= pick.weight_above;
    count += pick.blocks_above;
    range.rank = ((range.rank >> shift & ~(kBins - 1u)) | static_cast<uint32_t>(pick.bin)) << shift;
    range.open_bits = shift;
    if (pick.blocks == 1 || (Weight::kIsCount && goal == static_cast<uint64_t>(pick.blocks))) {
      // The whole bin, and all that ranks above its lowest rank: the open bits need not be known.
      return {range.rank, kAllTies, count + pick.blocks};
    }
    if (shift > 0 && pick.blocks <= kFew) {
      return best_of_few(histogram, range, weight, goal, count);
    }
  }
  const uint64_t each = weight.of(score_of(range.rank));
  const int ties = static_cast<int>((goal + each - 1) / each);
  return {range.rank, ties, count + ties};
}

}  // namespace compactattn
