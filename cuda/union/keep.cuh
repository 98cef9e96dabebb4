// Which blocks of one row of scores stay (rust/select/keep.rs): threshold, mass or density, between
// a floor and a cap. One CTA of cta::kThreads threads a row.
//
// Forced blocks are the first and the last ones, so what is left to rank is one range.
#pragma once

#include "../common/bits.cuh"
#include "best.cuh"

namespace compactattn {

// One row, its past blocks.
struct Row {
  const float* scores;  // [n], shared or global memory
  int n;
  int first_free;  // blocks first_free .. end_free are not forced
  int end_free;

  __host__ __device__ int free() const { return end_free - first_free; }
  __host__ __device__ int forced() const { return n - free(); }
};

__host__ __device__ inline Row row_of(const Settings& settings, const float* scores, int n) {
  const int sink = settings.sink_blocks < n ? settings.sink_blocks : n;
  const int local = settings.local_blocks < n - sink ? settings.local_blocks : n - sink;
  return {scores, n, sink, n - local};
}

// The forced blocks of word `word` of a row's bits.
__host__ __device__ inline uint32_t forced_word(const Row& row, int word) {
  return range_word(word, 0, row.first_free) | range_word(word, row.end_free, row.n);
}

// What one look at a row tells.
struct Survey {
  uint32_t heaviest;  // mass_bits, over all blocks; the rest is over those that are not forced
  uint32_t best;      // ranks
  uint32_t worst;
  uint32_t unjudged;
  uint32_t at_threshold;
};

__device__ inline Survey nothing_seen() { return {0, 0, 0xffffffffu, 0, 0}; }

__device__ inline Survey join_lanes(const Survey& x) {
  return {__reduce_max_sync(cta::kAllLanes, x.heaviest), __reduce_max_sync(cta::kAllLanes, x.best),
          __reduce_min_sync(cta::kAllLanes, x.worst), __reduce_add_sync(cta::kAllLanes, x.unjudged),
          __reduce_add_sync(cta::kAllLanes, x.at_threshold)};
}

__device__ inline Survey join(const Survey& a, const Survey& b) {
  return {max(a.heaviest, b.heaviest), max(a.best, b.best), min(a.worst, b.worst),
          a.unjudged + b.unjudged, a.at_threshold + b.at_threshold};
}

// Adds block `j`; `threshold`: its rank.
__device__ __forceinline__ void look(Survey& seen, const Row& row, uint32_t threshold, int j,
                                     float score) {
  seen.heaviest = max(seen.heaviest, mass_bits(score));
  if (j < row.first_free || j >= row.end_free) return;
  const uint32_t rank = rank_of(score);
  seen = join(seen, {0, rank, rank, rank == kUnjudged, rank >= threshold});
}

// Once a CTA: nothing keeps a second call from writing what the first one's threads still read.
__device__ inline Survey survey(const Row& row, float threshold) {
  __shared__ Survey warps[cta::kWarps];
  const uint32_t at = rank_of(threshold);
  Survey seen = nothing_seen();
  each_score(row.scores, 0, row.n, [&](int j, float score) { look(seen, row, at, j, score); });
  seen = join_lanes(seen);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = seen;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return join_lanes(lane < cta::kWarps ? warps[lane] : nothing_seen());
}

// The blocks that are not forced, by what the survey knows of their ranks.
__device__ inline Range free_blocks(const Row& row, const Survey& seen) {
  const int open_bits = 32 - __clz(seen.best ^ seen.worst);
  const uint32_t known = open_bits < 32 ? ~0u << open_bits : 0;
  return {row.scores, row.first_free, row.end_free, seen.best & known, open_bits};
}

// Between `least` and `most` blocks; between them, where it weighs, until they hold a share of all
// mass, less what forced blocks hold; what masses lack to 1 may count as held too.
struct ByMass {
  static constexpr bool kMayWeigh = true;
  const Settings& settings;
  const Row& row;
  FixedPoint mass;
  int least;
  int most;
  bool by_mass;

  __device__ bool weighs() const { return by_mass; }

  __device__ uint64_t of(float score) const { return mass.of(score); }

  __device__ void set_aside(Histogram& histogram) const {
    if (!by_mass) return;
    for (int i = threadIdx.x; i < row.forced(); i += cta::kThreads) {
      const int j = i < row.first_free ? i : i + row.free();
      add_weight(histogram.aside[0], histogram.aside[1], of(row.scores[j]));
    }
  }

  __device__ uint64_t goal(const Histogram& histogram, uint64_t free) const {
    if (!by_mass) return 0;
    const uint64_t forced = static_cast<uint64_t>(histogram.aside[1]) << 32 | histogram.aside[0];
    const uint64_t past = free + forced, whole = settings.mass_counts_open ? of(1.0f) : 0;
    const uint64_t open = whole > past ? whole - past : 0;
    const uint64_t target = share_of_mass(settings.keep_value, past + open);
    return target > open + forced ? target - open - forced : 0;
  }
};

// Forced blocks and those of the row's `min_budget` best, which are `best`, that are not forced.
__device__ inline int budget_of(const Row& row, const Best& best) {
  int above = 0, ties_before = 0, ties = 0;
  each_score(row.scores, 0, row.end_free, [&](int j, float score) {
    const uint32_t rank = rank_of(score);
    const bool is_free = j >= row.first_free;
    above += is_free && rank > best.rank;
    ties += is_free && rank == best.rank;
    ties_before += !is_free && rank == best.rank;
  });
  above = cta::total(above);
  ties = cta::total(ties);
  ties_before = cta::total(ties_before);
  return row.forced() + above + max(0, min(ties, best.ties - ties_before));
}

// Blocks that are wanted at most, beside the forced ones. Floor and cap bind the rule; neither may
// drop a block that cannot be judged.
__device__ inline int cap_of(const Settings& settings, const Row& row, const Survey& seen) {
  const int cap = share_of(settings.max_density, row.n) - row.forced();
  return min(max(cap, static_cast<int>(seen.unjudged)), row.free());
}

// What is wanted of a row that has no budget.
__device__ inline ByMass wanted(const Settings& settings, const Row& row, const Survey& seen,
                                int cap) {
  const bool by_mass = settings.keep == kMass;
  const uint32_t heaviest =
      settings.mass_counts_open ? max(seen.heaviest, bits_of(1.0f)) : seen.heaviest;
  const int floor = share_of(settings.min_density, row.n) - row.forced();
  const int least = min(max(floor, static_cast<int>(seen.unjudged)), cap);
  const int rule = settings.keep == kDensity ? share_of(settings.keep_value, row.n) - row.forced()
                                             : static_cast<int>(seen.at_threshold);
  const int count = min(max(rule, least), cap);
  return {
      settings, row, FixedPoint(heaviest, row.n), by_mass ? least : count, by_mass ? cap : count,
      by_mass};
}

// The best of a row that has free blocks. All by one copy of the code, for a launch meets it cold:
// where there is a budget, what that is comes first.
__device__ __forceinline__ Best best_of_row(const Settings& settings, const Row& row,
                                            const Survey& seen) {
  const int cap = cap_of(settings, row, seen);
  ByMass rule = wanted(settings, row, seen, cap);
  const Range free = free_blocks(row, seen);
  const bool is_at_threshold =
      settings.keep == kThreshold && rule.least == static_cast<int>(seen.at_threshold);
  const int least = rule.least;
  bool is_budget = settings.min_budget > 0;
  if (is_budget) rule.by_mass = false, rule.least = rule.most = min(settings.min_budget, row.n);
#pragma unroll 1
  while (true) {
    if (!is_budget) {
      if (rule.most <= 0) return kNothing;
      if (rule.least >= row.free()) return {0, kAllTies, row.free()};
      if (is_at_threshold && rule.least == least)
        return {rank_of(settings.keep_value), kAllTies, least};
    }
    const Best best = best_of(is_budget ? Range{row.scores, 0, row.n, 0, 32} : free, rule);
    if (!is_budget) return best;
    is_budget = false;
    rule.by_mass = settings.keep == kMass;
    rule.least = max(least, min(budget_of(row, best) - row.forced(), cap));
    rule.most = rule.by_mass ? cap : rule.least;
  }
}

// Clears all but the first `count` set bits of a row, counted over its words.
__device__ inline void keep_first_bits(uint32_t* bits, int words, int count) {
  for (int base = 0; base < words; base += cta::kThreads) {
    const int word = base + threadIdx.x;
    const uint32_t mine = word < words ? bits[word] : 0;
    const cta::Sum<int> sum = cta::exclusive_sum(__popc(mine));
    const int left = count - sum.before;
    if (word < words && __popc(mine) > left) bits[word] = lowest_bits(mine, left);
    count -= sum.total;
  }
}

// visit(word, rank) for each word of a row's bits, by one warp, with the rank of the lane's block;
// 0, below all ranks, for a block that is forced or after the row.
template <class Visit>
__device__ __forceinline__ void each_word(const Row& row, Visit visit) {
  const int words = words_of(row.n), lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = threadIdx.x / 32; first < words; first += kBatch * cta::kWarps) {
    float batch[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int j = (first + u * cta::kWarps) * 32 + lane;
      batch[u] = j < row.n ? row.scores[j] : 0.0f;
    }
#pragma unroll 1
    for (int u = 0, word = first; u < kBatch && word < words; ++u, word += cta::kWarps) {
      const int j = word * 32 + lane;
      const bool is_free = j >= row.first_free && j < row.end_free;
      visit(word, is_free ? rank_of(of_batch(batch, u)) : 0);
    }
  }
}

// Writes bits 0 .. n, up to the end of the last one's word: the best of the blocks that are not
// forced.
__device__ inline void mark(const Row& row, const Best& best, uint32_t* bits) {
  const int lane = threadIdx.x % 32;
  const bool all_ties = best.ties == kAllTies, some_ties = !all_ties && best.ties > 0;
  if (some_ties) {
    each_word(row, [&](int word, uint32_t rank) {
      const uint32_t ties = __ballot_sync(cta::kAllLanes, rank == best.rank);
      if (lane == 0) bits[word] = ties;
    });
    __syncthreads();
    keep_first_bits(bits, words_of(row.n), best.ties);
    __syncthreads();
  }
  const uint32_t least = all_ties ? max(best.rank, 1u) : best.rank + 1;
  each_word(row, [&](int word, uint32_t rank) {
    const uint32_t above = __ballot_sync(cta::kAllLanes, rank >= least);
    if (lane == 0) bits[word] = above | (some_ties ? bits[word] : 0);
  });
  __syncthreads();
}

// Keeps blocks of a row whose scores all threads can see, beside the forced ones (`forced_word`);
// `bits` [words_of(n)], shared memory. `seen`: what a look at the row has told, if there was one.
__device__ inline void keep(const Settings& settings, const Row& row, uint32_t* bits,
                            bool is_surveyed = false, Survey seen = {}) {
  Best best = kNothing;
  if (row.free() > 0) {
    if (!is_surveyed) seen = survey(row, settings.keep_value);
    best = best_of_row(settings, row, seen);
  }
  mark(row, best, bits);
}

}  // namespace compactattn
