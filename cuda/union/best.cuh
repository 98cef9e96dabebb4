// The best of a row, by count, by mass or by both, without sorting: radix select over ranks, 8 bits
// a step or as many as make a bin for each thread, until a bin has few blocks.
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

// When the best blocks of a range are enough: once they weigh `goal`, but no fewer than `least` and
// no more than `most`, of those that there are. The range's own weight reaches the goal.
struct Enough {
  int least;
  int most;
  uint64_t goal;

  __device__ __forceinline__ bool operator()(int blocks, uint64_t weight) const {
    return blocks >= most || (blocks >= least && weight >= goal);
  }

  // Of blocks that weigh `each`, how many more than `blocks`, which weigh `weight`: 1 or more.
  __device__ __forceinline__ int more(int blocks, uint64_t weight, uint64_t each) const {
    const uint64_t left = goal > weight ? goal - weight : 0, any = most - blocks;
    const uint64_t heavy = left > 0 && each > 0 ? (left + each - 1) / each : left > 0 ? any : 0;
    return static_cast<int>(min(any, max(heavy, static_cast<uint64_t>(max(0, least - blocks)))));
  }
};

// A rule by which blocks are wanted: so many.
struct ByCount {
  static constexpr bool kMayWeigh = false;
  int least;
  int most;

  __device__ explicit ByCount(int count) : least(count), most(count) {}
  __device__ bool weighs() const { return false; }
  __device__ uint64_t of(float) const { return 0; }
  __device__ void set_aside(Histogram&) const {}
  __device__ uint64_t goal(const Histogram&, uint64_t) const { return 0; }
};

// Number `u` of a batch: a few selections in place of a copy of what is done with each.
__device__ __forceinline__ float of_batch(const float (&batch)[kBatch], int u) {
  float x = batch[0];
#pragma unroll
  for (int i = 1; i < kBatch; ++i) x = u == i ? batch[i] : x;
  return x;
}

// visit(j, score) for blocks begin .. end; loads run ahead of what is done with them. That is one
// copy of code: a launch meets it cold, and waits longer for it than for anything it does.
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
#pragma unroll 1
    for (int u = 0, j = first; u < kBatch && j < end; ++u, j += cta::kThreads) {
      visit(j, of_batch(batch, u));
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

template <class Rule>
__device__ __forceinline__ void fill_bins(Histogram& histogram, const Range& range, int shift,
                                          const Rule& rule) {
  each_score(range.scores, range.begin, range.end, [&](int, float score) {
    const uint32_t rank = rank_of(score);
    if (!range.has(rank)) return;
    const int bin = (rank >> shift) % kBins;
    atomicAdd(&histogram.blocks[bin], 1u);
    if (Rule::kMayWeigh && rule.weighs()) {
      add_weight(histogram.low[bin], histogram.high[bin], rule.of(score));
    }
  });
  __syncthreads();
}

// Blocks and weight of a thread's bin, and over the better bins; takes them out of the histogram.
struct Bin {
  int blocks;
  int blocks_above;
  uint64_t weight;
  uint64_t weight_above;
  uint64_t all;  // weight of all bins
};

template <class Rule>
__device__ __forceinline__ Bin sum_bins(Histogram& histogram, const Rule& rule) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at = kBins - 1 - static_cast<int>(threadIdx.x);
  const bool weighs = Rule::kMayWeigh && rule.weighs();
  Bin bin{static_cast<int>(histogram.blocks[at]), 0, 0, 0, 0};
  const uint32_t blocks = cta::lane_sum<32>(histogram.blocks[at]);
  uint64_t weight = 0;
  if (weighs) {
    bin.weight = static_cast<uint64_t>(histogram.high[at]) << 32 | histogram.low[at];
    weight = cta::lane_sum<32>(bin.weight);
  }
  histogram.blocks[at] = histogram.low[at] = histogram.high[at] = 0;
  if (lane == 31) histogram.warp_blocks[warp] = blocks, histogram.warp_weights[warp] = weight;
  __syncthreads();
  const cta::Sum<uint32_t> of_blocks = cta::sum_of_warps(histogram.warp_blocks);
  bin.blocks_above = static_cast<int>(of_blocks.before + blocks) - bin.blocks;
  if (weighs) {
    const cta::Sum<uint64_t> of_weights = cta::sum_of_warps(histogram.warp_weights);
    bin.weight_above = of_weights.before + weight - bin.weight;
    bin.all = of_weights.total;
  }
  return bin;
}

// What is known to be kept: blocks that rank above all that are open, and their weight.
struct Kept {
  int blocks;
  uint64_t weight;
};

// The bin in which the best are `enough`.
__device__ __forceinline__ Pick pick_bin(Histogram& histogram, const Bin& bin, const Enough& enough,
                                         const Kept& kept) {
  const int above = kept.blocks + bin.blocks_above;
  const uint64_t weight_above = kept.weight + bin.weight_above;
  if (!enough(above, weight_above) && enough(above + bin.blocks, weight_above + bin.weight)) {
    histogram.pick = {kBins - 1 - static_cast<int>(threadIdx.x), bin.blocks, bin.blocks_above,
                      bin.weight_above};
  }
  __syncthreads();
  return histogram.pick;
}

// Keys of the few blocks of `range`, no two the same, that ascend with their ranks; after them keys
// and weights stay 0.
template <class Rule>
__device__ __forceinline__ void gather_few(Histogram& histogram, const Range& range,
                                           const Rule& rule) {
  each_score(range.scores, range.begin, range.end, [&](int, float score) {
    const uint32_t rank = rank_of(score);
    if (!range.has(rank)) return;
    const uint32_t slot = atomicAdd(&histogram.few, 1u);
    histogram.blocks[slot] = (rank ^ range.rank) << kSlotBits | slot;
    if (Rule::kMayWeigh && rule.weighs()) {
      const uint64_t weighs = rule.of(score);
      histogram.low[slot] = static_cast<uint32_t>(weighs);
      histogram.high[slot] = static_cast<uint32_t>(weighs >> 32);
    }
  });
  __syncthreads();
}

// Adds to `kept` the few blocks with higher keys, by as many threads side by side as there are for
// each, four keys at a time.
template <class Rule>
__device__ __forceinline__ void add_better(const Histogram& histogram, uint32_t key, int few,
                                           Kept& kept) {
  constexpr int kSideBySide = cta::kThreads / kFew;
  const auto four = [](const uint32_t* words, int j) {
    return *reinterpret_cast<const uint4*>(words + j);
  };
  int blocks = 0;
  uint64_t weight = 0;
  const auto add = [&](uint32_t other, uint32_t low, uint32_t high) {
    if (other > key) ++blocks, weight += static_cast<uint64_t>(high) << 32 | low;
  };
#pragma unroll 1
  for (int j = threadIdx.x % kSideBySide * 4; j < few; j += 4 * kSideBySide) {
    const uint4 keys = four(histogram.blocks, j);
    uint4 low{}, high{};
    if (Rule::kMayWeigh) low = four(histogram.low, j), high = four(histogram.high, j);
    add(keys.x, low.x, high.x);
    add(keys.y, low.y, high.y);
    add(keys.z, low.z, high.z);
    add(keys.w, low.w, high.w);
  }
#pragma unroll
  for (int d = 1; d < kSideBySide; d *= 2) {
    blocks += __shfl_xor_sync(cta::kAllLanes, blocks, d);
    if (Rule::kMayWeigh) weight += __shfl_xor_sync(cta::kAllLanes, weight, d);
  }
  kept.blocks += blocks;
  kept.weight += weight;
}

// The best of the few blocks of `range` and of those `kept` that are `enough`. In place of all
// steps that are left.
template <class Rule>
__device__ __forceinline__ Best best_of_few(Histogram& histogram, const Range& range,
                                            const Rule& rule, const Enough& enough, Kept kept) {
  gather_few(histogram, range, rule);
  const int few = static_cast<int>(histogram.few), slot = threadIdx.x * kFew / cta::kThreads;
  const uint32_t key = histogram.blocks[slot];
  const uint64_t own = static_cast<uint64_t>(histogram.high[slot]) << 32 | histogram.low[slot];
  add_better<Rule>(histogram, key, few, kept);
  const bool is_mine = slot < few && threadIdx.x % (cta::kThreads / kFew) == 0;
  if (is_mine && !enough(kept.blocks, kept.weight) && enough(kept.blocks + 1, kept.weight + own)) {
    histogram.pick = {static_cast<int>(key), 1, kept.blocks, kept.weight};
  }
  __syncthreads();
  const uint32_t last = static_cast<uint32_t>(histogram.pick.bin);
  const uint32_t rank = range.rank | last >> kSlotBits;
  const int count = histogram.pick.blocks_above + 1;
  // Blocks of one rank weigh the same, so it is no matter which of them has which slot.
  const bool is_tie = is_mine && (key ^ last) >> kSlotBits == 0;
  if (!__syncthreads_or(is_tie && key < last)) return {rank, kAllTies, count};
  return {rank, __syncthreads_count(is_tie && key >= last), count};
}

// The fewest best blocks of `range` that are enough by `rule`, which may want to know what the
// range weighs; none where none are wanted.
template <class Rule>
__device__ __forceinline__ Best best_of(Range range, const Rule& rule) {
  Histogram& histogram = cta_histogram();
  histogram.blocks[threadIdx.x] = histogram.low[threadIdx.x] = histogram.high[threadIdx.x] = 0;
  if (threadIdx.x < 2) histogram.aside[threadIdx.x] = 0;
  if (threadIdx.x == 0) histogram.few = 0;
  __syncthreads();
  rule.set_aside(histogram);
  Kept kept{0, 0};
  Enough enough{rule.least, rule.most, 0};
#pragma unroll 1
  for (bool first = true; first || range.open_bits > 0; first = false) {
    const int shift = max(0, range.open_bits - kDigitBits);
    fill_bins(histogram, range, shift, rule);
    const Bin bin = sum_bins(histogram, rule);
    if (first) enough.goal = rule.goal(histogram, bin.all);
    if (enough(kept.blocks, kept.weight)) {
      // Whoever calls next clears what others may still be reading.
      __syncthreads();
      return kNothing;
    }
    const Pick pick = pick_bin(histogram, bin, enough, kept);
    kept.blocks += pick.blocks_above;
    kept.weight += pick.weight_above;
    range.rank = ((range.rank >> shift & ~(kBins - 1u)) | static_cast<uint32_t>(pick.bin)) << shift;
    range.open_bits = shift;
    const bool is_whole = !rule.weighs() && kept.blocks + pick.blocks == rule.least;
    if (pick.blocks == 1 || is_whole) {
      // The whole bin, and all that ranks above its lowest rank: the open bits need not be known.
      return {range.rank, kAllTies, kept.blocks + pick.blocks};
    }
    if (shift > 0 && pick.blocks <= kFew) {
      return best_of_few(histogram, range, rule, enough, kept);
    }
  }
  const int ties = enough.more(kept.blocks, kept.weight, rule.of(score_of(range.rank)));
  return {range.rank, ties, kept.blocks + ties};
}

}  // namespace compactattn
