// Shares of plan's items, one of equal cost for each CTA of attend, and the pieces they are made
// of.
//
// Where there are many items, each CTA first does whole ones, a wave of neighbours at a time, so
// that the few lists of a wave are read from device memory once for all their tiles: long lists
// first (order.cuh), and each wave in the other direction than the one before, so that no CTA has
// the longer of every wave. The last items are cut into contiguous shares that even out the sums,
// at most one cut in each (stream-K, arXiv 2301.03598, with costs in place of counts).
#pragma once

#include <cstring>

#include "../params.h"
#include "scan.cuh"

namespace compactattn {

constexpr int kMaxCtas = kPlanThreads;  // of attend
constexpr int kNearItems = 4096;        // the costs of fewer stay in shared memory
// In half tiles: a tile is 2, what an item costs beside its tiles 3 (prologue and epilogue,
// about 2.5 us of 1.7 a tile).
constexpr int kTileCost = 2;
constexpr int kItemCost = 3;
constexpr int kFewestTiles = 4;  // of a piece: fewer are not worth a partial result
// Of a share; it also keeps two cuts of one item apart.
constexpr int kLeastCost = kItemCost + kTileCost * kFewestTiles;

// Where the shares of two CTAs meet: `tiles` of `item` are done before the cut, counted from the
// stream's end. 0 <= tiles < tiles of the item; the last cut is {num_items, 0}.
struct alignas(8) Cut {
  int32_t item;
  int32_t tiles;

  __device__ bool divides(int other) const { return tiles > 0 && item == other; }
};

// Shared memory of the shares.
struct NearShares {
  uint32_t costs[kNearItems + 1];
  uint32_t waves;
  Cut cuts[kMaxCtas + 1];
  uint32_t dividing[kPlanWarps];  // cuts that divide an item, a bit each
};

// What is shared out, with the costs as the unsigned sums that they are.
struct Items {
  uint32_t* costs;  // [count + 1] of the items before each
  int count;
  int ctas;
  int most_waves;  // that leave at least half an item a CTA to even out the sums with
  bool whole;      // cuts fall between items only
};

// A barrier or more before they are shared out; their costs are not there yet.
__device__ __forceinline__ Items items_to_share(const Stages& stages, int count, NearShares& near) {
  const int ctas = stages.num_ctas, most_waves = max(0, (2 * count - ctas) / (2 * ctas));
  if (threadIdx.x == 0) near.waves = most_waves;
  return {nullptr, count, ctas, most_waves, stages.whole_items != 0};
}

__device__ __forceinline__ bool is_in_warps_of(int threads) {
  return static_cast<int>(threadIdx.x) / 32 * 32 < threads;
}

// Buffers are aligned for it, their types are not.
template <class T>
__device__ __forceinline__ void store_whole(T* to, const T& from) {
  static_assert(sizeof(T) % sizeof(int4) == 0, "");
  int4 words[sizeof(T) / sizeof(int4)];
  memcpy(words, &from, sizeof(T));
#pragma unroll
  for (int i = 0; i < sizeof(T) / sizeof(int4); ++i) reinterpret_cast<int4*>(to)[i] = words[i];
}

// costs[i] becomes the cost of the items before i; the total.
__device__ __forceinline__ uint32_t sum_costs(const Items& items) {
  const int each = (items.count + kPlanThreads - 1) / kPlanThreads;
  const int begin = static_cast<int>(threadIdx.x) * each;
  const int mine = min(each, items.count - begin);  // may be less than 0
  uint32_t* costs = items.costs + begin;
  uint32_t sum_of_mine = 0;
#pragma unroll 4
  for (int i = 0; i < mine; ++i) sum_of_mine += costs[i];
  const Scan<uint32_t> sum = scan_sum(sum_of_mine, items.count);
  uint32_t before = sum.before;
#pragma unroll 4
  for (int i = 0; i < mine; ++i) {
    const uint32_t cost = costs[i];
    costs[i] = before;
    before += cost;
  }
  if (threadIdx.x == 0) items.costs[items.count] = sum.total;
  __syncthreads();
  return sum.total;
}

// Cost of one item.
__device__ __forceinline__ uint32_t cost_of(const Items& items, int item) {
  return items.costs[item + 1] - items.costs[item];
}

__device__ __forceinline__ int tiles_of(const Items& items, int item) {
  return static_cast<int>((cost_of(items, item) - kItemCost) / kTileCost);
}

// The cut nearest below `cost` that leaves no tiny piece; between items, the nearest. It is not
// before item `low`.
__device__ __forceinline__ Cut cut_at(const Items& items, uint32_t cost, uint32_t low) {
  uint32_t high = items.count;  // costs[low] <= cost < costs[high + 1]
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (items.costs[middle] <= cost) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int item = static_cast<int>(low);
  if (item >= items.count) return {items.count, 0};
  const int tiles = tiles_of(items, item);
  const int done = (static_cast<int>(cost - items.costs[item]) - kItemCost) / kTileCost;
  if (items.whole) return {2 * done < tiles ? item : item + 1, 0};
  if (done < kFewestTiles) return {item, 0};
  if (tiles - done < kFewestTiles) return {item + 1, 0};
  return {item, done};
}

// The item of a CTA in a wave.
__device__ __forceinline__ int item_of_wave(int wave, int cta, int ctas) {
  return wave * ctas + (wave % 2 == 0 ? cta : ctas - 1 - cta);
}

// What the waves cost the CTAs before this thread's.
__device__ __forceinline__ uint32_t cost_of_waves_before(const Items& items, int waves) {
  const int cta = threadIdx.x, ctas = items.ctas;
  uint32_t cost = 0;
#pragma unroll 4
  for (int w = 0; w < waves; ++w) {
    const int first = w * ctas + (w % 2 == 0 ? 0 : ctas - cta);
    cost += items.costs[first + cta] - items.costs[first];
  }
  return cost;
}

// Waves of whole items: as many as leave enough for the shares, and no CTA over its fair share,
// `fair` of this thread's.
__device__ __forceinline__ int count_waves(const Items& items, NearShares& near, uint32_t fair) {
  const int cta = threadIdx.x;
  if (cta < items.ctas) {
    uint32_t done = 0, fit = 0;
#pragma unroll 4
    for (int w = 0; w < items.most_waves; ++w) {
      done += cost_of(items, item_of_wave(w, cta, items.ctas));
      fit += done <= fair;
    }
    atomicMin(&near.waves, fit);
  }
  __syncthreads();
  return static_cast<int>(near.waves);
}

// The cut before this thread's CTA, for as many shares as there are CTAs; the waves before them.
__device__ __forceinline__ Cut cut_for_all(const Items& items, NearShares& near, uint32_t total,
                                           int& waves) {
  const uint32_t cta = threadIdx.x, ctas = items.ctas;
  // Shares start at total * cta / ctas, in 32 bits: no two differ by more than one.
  const uint32_t each = total / ctas, rest = total - each * ctas;
  const uint32_t more = rest * cta / ctas, left = rest * cta - more * ctas;
  waves = count_waves(items, near, each + (left + rest >= ctas));
  const int first = waves * items.ctas;
  if (cta == 0 || cta >= ctas) return {first, 0};
  const uint32_t before = each * cta + more - cost_of_waves_before(items, waves);
  return cut_at(items, items.costs[first] + before, first);
}

// The same for fewer: there is not enough to do.
__device__ __forceinline__ Cut cut_for_some(const Items& items, uint32_t total, uint32_t shares) {
  const uint32_t cta = threadIdx.x;
  if (cta >= shares) return {items.count, 0};
  return cut_at(items, total / shares * cta + total % shares * cta / shares, 0);
}

// Parts of the item that cut `at` divides which CTAs before the cut do, and those after it; none
// where it divides no item.
__device__ __forceinline__ int parts_before(const Cut* cuts, Cut cut, int at) {
  int parts = cut.tiles > 0;
  while (0 < parts && parts < at && cuts[at - parts].divides(cut.item)) ++parts;
  return parts;
}

__device__ __forceinline__ int parts_after(const Cut* cuts, Cut cut, int at, int ctas) {
  int parts = cut.tiles > 0;
  while (0 < parts && parts < ctas - at && cuts[at + parts].divides(cut.item)) ++parts;
  return parts;
}

// The pieces of this thread's CTA: its whole items, then its share of the others, from its cut to
// the next. The piece that others finish comes first among those: then all CTAs walk the lists from
// their ends in step, and each box is read from device memory about once.
__device__ __forceinline__ void write_pieces(const Items& items, const Cut* cuts, int waves,
                                             Piece* to) {
  const int cta = threadIdx.x, ctas = items.ctas;
  const Cut first = cuts[cta], last = cuts[cta + 1];
#pragma unroll 4
  for (int w = 0; w < waves; ++w) {
    const int item = item_of_wave(w, cta, ctas);
    store_whole(to + w, Piece{item, 0, tiles_of(items, item), 0, 1});
  }
  to += waves;
  const int of_first = parts_before(cuts, first, cta);
  const int of_last = parts_after(cuts, last, cta + 1, ctas);
  const int count = last.item - first.item + (last.tiles > 0), shift = last.tiles > 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int item = shift && i == 0 ? last.item : first.item + i - shift;
    const int tiles = tiles_of(items, item), done = item == first.item ? first.tiles : 0;
    const int begin = item == last.item ? tiles - last.tiles : 0;
    const int begun = item == first.item ? of_first : 0;
    const int left = item == last.item ? of_last : 0;
    store_whole(to + i, Piece{item, begin, tiles - done, static_cast<int16_t>(begun),
                              static_cast<int16_t>(begun + 1 + left)});
  }
}

// Pieces from cuts, CTA by CTA; `first` is the cut before this thread's.
__device__ __forceinline__ void piece_up(const Items& items, NearShares& near, const Stages& stages,
                                         int waves, Cut first) {
  const int cta = threadIdx.x, ctas = items.ctas, lane = cta % 32, warp = cta / 32;
  const uint32_t dividing = __ballot_sync(0xffffffffu, cta < ctas && first.tiles > 0);
  if (lane == 0) near.dividing[warp] = dividing;
  if (cta < ctas) near.cuts[cta] = first;
  if (cta == 0) near.cuts[ctas] = {items.count, 0};
  __syncthreads();
  const uint32_t of_lane = lane < warp ? __popc(near.dividing[lane]) : 0;
  const int divided = static_cast<int>(__reduce_add_sync(0xffffffffu, of_lane)) +
                      __popc(dividing & 0xffffffffu >> (31 - lane));
  if (cta >= ctas) return;
  // The items that CTAs before this one begin, and a piece more for each that a cut divides.
  const int start = cta * waves + first.item - waves * ctas + divided;
  stages.piece_starts[cta] = start;
  if (cta == ctas - 1) stages.piece_starts[ctas] = start + waves + items.count - first.item;
  write_pieces(items, near.cuts, waves, stages.pieces + start);
}

// From the cost of each item to pieces; by the warps of all items and CTAs.
__device__ __forceinline__ void share_out(const Items& items, NearShares& near,
                                          const Stages& stages) {
  const uint32_t total = sum_costs(items), ctas = items.ctas;
  if (!is_in_warps_of(items.ctas)) return;
  const uint32_t shares = max(1u, min(ctas, total / kLeastCost));
  int waves = 0;
  const Cut cut =
      shares == ctas ? cut_for_all(items, near, total, waves) : cut_for_some(items, total, shares);
  piece_up(items, near, stages, waves, cut);
}

}  // namespace compactattn
