// The best of a row by count or by mass, without sorting: radix select over ranks, 8 bits a step.
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

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
static_assert(kBins == cta::kThreads, "a thread for each bin");
constexpr int kAllTies = INT_MAX;

// The blocks that rank above `rank`, and the first `ties` of those that rank equal (kAllTies: all).
struct Best {
  uint32_t rank;
  int ties;
  int count;  // blocks above and ties
};

constexpr Best kNothing{0xffffffffu, 0, 0};

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

// Blocks and weight per digit; in shared memory.
struct Histogram {
  uint32_t blocks[kBins];
  uint32_t low[kBins];
  uint32_t high[kBins];
  Pick pick;
};

// Each block weighs 1.
struct ByCount {
  static constexpr bool kIsCount = true;
  __device__ uint64_t of(float) const { return 1; }
};

// Each block weighs its mass.
struct ByMass {
  static constexpr bool kIsCount = false;
  FixedPoint mass;
  __device__ uint64_t of(float score) const { return mass.of(score); }
};

// 64 bits by two atomics of 32: whoever makes the low word wrap carries.
__device__ inline void add_weight(Histogram& histogram, int bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&histogram.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before);
  if (high > 0) atomicAdd(&histogram.high[bin], high);
}

template <class Weight>
__device__ void fill_bins(Histogram& histogram, const Range& range, int shift, Weight weight) {
  histogram.blocks[threadIdx.x] = histogram.low[threadIdx.x] = histogram.high[threadIdx.x] = 0;
  __syncthreads();
  for (int j = range.begin + threadIdx.x; j < range.end; j += cta::kThreads) {
    const float score = range.scores[j];
    const uint32_t rank = rank_of(score);
    if (!range.has(rank)) continue;
    const int bin = (rank >> shift) % kBins;
    atomicAdd(&histogram.blocks[bin], 1u);
    if constexpr (!Weight::kIsCount) add_weight(histogram, bin, weight.of(score));
  }
  __syncthreads();
}

// The bin in which the weight from the best bin on reaches `goal`, 1 .. weight of all bins.
template <class Weight>
__device__ Pick pick_bin(Histogram& histogram, uint64_t goal) {
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
  const uint32_t blocks = histogram.blocks[bin];
  const uint32_t blocks_above = cta::exclusive_sum(blocks).before;
  uint64_t weight = blocks, above = blocks_above;
  if constexpr (!Weight::kIsCount) {
    weight = static_cast<uint64_t>(histogram.high[bin]) << 32 | histogram.low[bin];
    above = cta::exclusive_sum(weight).before;
  }
  if (above < goal && goal <= above + weight) {
    histogram.pick = {bin, static_cast<int>(blocks), static_cast<int>(blocks_above), above};
  }
  __syncthreads();
  return histogram.pick;
}

// The fewest best blocks of `range` that weigh `goal`, 1 .. weight of the range.
template <class Weight>
__device__ Best best_of(Histogram& histogram, Range range, Weight weight, uint64_t goal) {
  int count = 0;
  while (range.open_bits > 0) {
    const int shift = max(0, range.open_bits - kDigitBits);
    fill_bins(histogram, range, shift, weight);
    const Pick pick = pick_bin<Weight>(histogram, goal);
    goal -= pick.weight_above;
    count += pick.blocks_above;
    range.rank = ((range.rank >> shift & ~(kBins - 1u)) | static_cast<uint32_t>(pick.bin)) << shift;
    range.open_bits = shift;
    if (pick.blocks == 1 || (Weight::kIsCount && goal == static_cast<uint64_t>(pick.blocks))) {
      // The whole bin, and all that ranks above its lowest rank: the open bits need not be known.
      return {range.rank, kAllTies, count + pick.blocks};
    }
  }
  const uint64_t each = weight.of(score_of(range.rank));
  const int ties = static_cast<int>((goal + each - 1) / each);
  return {range.rank, ties, count + ties};
}

}  // namespace compactattn
