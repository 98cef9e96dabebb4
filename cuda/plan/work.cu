// plan: the items of a step, and their cut into one share of equal cost for each CTA of attend.
//
// One CTA; items and cuts depend on spans and on the lengths of the lists alone. Where there are
// many items, each CTA first does whole ones, a wave of neighbours at a time, so that the few lists
// of a wave are read from device memory once for all their tiles: long lists first (order.cuh), and
// each wave in the other direction than the one before, so that no CTA has the longer of every
// wave. The last items are cut into contiguous shares that even out the sums, at most one cut in
// each (stream-K, arXiv 2301.03598, with costs in place of counts).
#include "../ptx/grid.cuh"
#include "narrow.cuh"
#include "order.cuh"

namespace compactattn {
namespace {

constexpr int kThreads = kPlanThreads;
constexpr int kMaxCtas = kPlanThreads;  // of attend
// Where sums and searches over fewer stay in shared memory.
constexpr int kNearItems = 4096;
constexpr int kNearSpans = 1024;
// Longest lists first where a list's items are what shares its boxes; lists of an item or two share
// them with the other lists of their KV head instead.
constexpr int kItemsToOrder = 4;  // a list, on average
// In half tiles: a tile is 2, what an item costs beside its tiles 3 (prologue and epilogue,
// about 2.5 us of 1.7 a tile).
constexpr int kTileCost = 2;
constexpr int kItemCost = 3;
constexpr int kFewestTiles = 4;  // of a piece: fewer are not worth a partial result
// Of a share; it also keeps two cuts of one item apart.
constexpr int kLeastCost = kItemCost + kTileCost * kFewestTiles;

// Where the shares of two CTAs meet: `tiles` of `item` are done before the cut, counted from the
// stream's end. 0 <= tiles < tiles of the item; the last cut is {num_items, 0}.
struct Cut {
  int32_t item;
  int32_t tiles;

  __device__ bool divides(int other) const { return tiles > 0 && item == other; }
};

// What this stage keeps at hand.
struct Near {
  uint32_t costs[kNearItems + 1];
  Cut cuts[kMaxCtas + 1];
  int32_t first_items[kNearSpans];  // by list span
  uint32_t keys[kPlanThreads];
  int32_t list_starts[kPlanThreads];  // by list row
};

// What this stage writes, with the costs as the unsigned sums that they are.
struct Plan {
  Work work;
  WorkItem* items;
  Cut* cuts;
  Piece* pieces;
  int* piece_starts;
  uint32_t* costs;
  const int32_t* first_items;  // null: in the spans alone
  const int32_t* list_starts;  // first items of lists; null: they follow each other
  bool by_kv_head;             // within a chunk
  int num_items;
  int num_spans;
};

__device__ Plan plan_of(const Step& step, Near& near) {
  const Stages& stages = step.stages;
  const Counters counters = *stages.counters;
  Plan plan = {};
  plan.work.items = stages.items;
  plan.work.boxes = stages.boxes;
  plan.work.max_boxes = step.layout.max_boxes;
  plan.work.log2_box_tokens = step.layout.log2_box_tokens;
  plan.items = stages.items;
  plan.cuts = near.cuts;
  plan.pieces = stages.pieces;
  plan.piece_starts = stages.piece_starts;
  plan.num_items = min(counters.num_items, stages.max_items);
  plan.num_spans = counters.num_list_spans;
  plan.costs =
      plan.num_items <= kNearItems ? near.costs : reinterpret_cast<uint32_t*>(stages.costs);
  if (plan.num_spans <= kNearSpans) {
    for (int i = threadIdx.x; i < plan.num_spans; i += kThreads) {
      near.first_items[i] = stages.list_spans[i].first_item;
    }
    plan.first_items = near.first_items;
    __syncthreads();
  }
  return plan;
}

// The list span whose items include `item`: the last that starts at or before it.
__device__ int span_of(const Stages& stages, const Plan& plan, int item) {
  int low = 0, high = plan.num_spans - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const int first =
        plan.first_items ? plan.first_items[middle] : stages.list_spans[middle].first_item;
    if (first <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Tokens of a list; a caller's own table may claim more than its row holds.
__device__ int stream_len_of(const Step& step, int list_row) {
  const int count = min(max(step.stages.counts[list_row], 0), step.layout.max_boxes);
  return min(step.stages.stream_lens[list_row], count << step.layout.log2_box_tokens);
}

__device__ int lists_per_span(const Layout& layout) {
  return layout.num_kv_heads * layout.lists_per_kv_head;
}

// Items of each list of a span.
__device__ int items_of(const Layout& layout, int span_len) {
  const int tile_tokens = kTileRows / layout.heads_per_list;
  return (span_len + tile_tokens - 1) / tile_tokens;
}

// Long lists first, or KV head by KV head, where it pays.
__device__ void order_lists(const Step& step, Near& near, Plan& plan) {
  const Layout& layout = step.layout;
  const int per_span = lists_per_span(layout), row = threadIdx.x;
  const int64_t lists = static_cast<int64_t>(plan.num_spans) * per_span;
  plan.by_kv_head = plan.num_items < kItemsToOrder * lists;
  if (lists > kPlanThreads || plan.by_kv_head) return;
  uint32_t tiles = 0;
  int items = 0;
  if (row < lists) {
    tiles = static_cast<uint32_t>(max(0, stream_len_of(step, row))) / kTileTokens;
    items = items_of(layout, step.stages.list_spans[row / per_span].len);
  }
  const int count = static_cast<int>(lists);
  if (start_longest_first(count, tiles, items, near.keys, near.list_starts)) {
    plan.list_starts = near.list_starts;
  }
}

// An item, and which it is.
struct PlacedItem {
  WorkItem item;
  int at;
};

// Item `index` of the spans in order: of a span list by list, then tile by tile.
__device__ PlacedItem item_at(const Step& step, const Plan& plan, int index) {
  const Layout& layout = step.layout;
  const int list_span = span_of(step.stages, plan, index);
  const Span span = step.stages.list_spans[list_span];
  const int tile_tokens = kTileRows / layout.heads_per_list;
  const int tiles = items_of(layout, span.len);
  const int list = (index - span.first_item) / tiles;
  const int tile = index - span.first_item - list * tiles;
  const int first = tile * tile_tokens;
  const int kv_head = list / layout.lists_per_kv_head;
  const int first_head = (list - kv_head * layout.lists_per_kv_head) * layout.heads_per_list;
  WorkItem item = {};
  item.list_row = list_span * lists_per_span(layout) + list;
  item.kv_head = kv_head;
  item.q_token = span.q_start + first;
  item.num_tokens = min(tile_tokens, span.len - first);
  item.q_head = kv_head * layout.group_size + first_head;
  item.tokens_after = span.len - 1 - first;
  item.num_heads = min(layout.heads_per_list, layout.group_size - first_head);
  item.stream_len = stream_len_of(step, item.list_row);
  if (plan.list_starts) return {item, plan.list_starts[item.list_row] + tile};
  if (!plan.by_kv_head) return {item, index};
  const int before = span.first / max(1, layout.list_span) * lists_per_span(layout) *
                     items_of(layout, layout.list_span);
  const int in_span = lists_per_span(layout) * tiles;
  const int at = index - span.first_item;
  return {item, place_by_kv_head(span, layout.num_kv_heads, before, in_span, at)};
}

// Items, and in `costs` the cost of each; `means`: null without correction.
__device__ void write_items(const Step& step, const Plan& plan, const Means* means) {
  for (int i = threadIdx.x; i < plan.num_items; i += kThreads) {
    const auto [item, at] = item_at(step, plan, i);
    plan.items[at] = item;
    const int before = means ? skipped_by(*means, item).tiles(kTileTokens) : 0;
    plan.costs[at] = kItemCost + kTileCost * (before + stream_of(plan.work, item).tiles);
  }
  __syncthreads();
}

// costs[i] becomes the cost of the items before i; the total.
__device__ uint32_t sum_costs(const Plan& plan) {
  const int each = (plan.num_items + kThreads - 1) / kThreads;
  const int begin = min(plan.num_items, static_cast<int>(threadIdx.x) * each);
  const int end = min(plan.num_items, begin + each);
  uint32_t mine = 0;
  for (int i = begin; i < end; ++i) mine += plan.costs[i];
  const Scan<uint32_t> sum = scan_sum(mine, plan.num_items);
  uint32_t before = sum.before;
  for (int i = begin; i < end; ++i) {
    const uint32_t cost = plan.costs[i];
    plan.costs[i] = before;
    before += cost;
  }
  if (threadIdx.x == 0) plan.costs[plan.num_items] = sum.total;
  __syncthreads();
  return sum.total;
}

// The cut nearest below `cost` that leaves no tiny piece; between items, the nearest.
__device__ Cut cut_at(const Plan& plan, uint32_t cost, bool whole_items) {
  int low = 0, high = plan.num_items;  // costs[low] <= cost < costs[high + 1]
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (plan.costs[middle] <= cost) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low >= plan.num_items) return {plan.num_items, 0};
  const int within = static_cast<int>(cost - plan.costs[low]);
  const int tiles = static_cast<int>(plan.costs[low + 1] - plan.costs[low] - kItemCost) / kTileCost;
  const int done = (within - kItemCost) / kTileCost;
  if (whole_items) return {2 * done < tiles ? low : low + 1, 0};
  if (done < kFewestTiles) return {low, 0};
  if (tiles - done < kFewestTiles) return {low + 1, 0};
  return {low, done};
}

// Cost of one item.
__device__ uint32_t cost_of(const Plan& plan, int item) {
  return plan.costs[item + 1] - plan.costs[item];
}

// The item of a CTA in a wave.
__device__ int item_of_wave(int wave, int cta, int ctas) {
  return wave * ctas + (wave % 2 == 0 ? cta : ctas - 1 - cta);
}

// Each CTA's waves of whole items, and in `done` what they cost the CTA of this thread: as many as
// leave at least half an item a CTA to even out the sums with, and no CTA over its fair share.
__device__ int count_waves(const Plan& plan, int ctas, uint32_t fair, uint32_t& done) {
  const int cta = threadIdx.x;
  int waves = max(0, (2 * plan.num_items - ctas) / (2 * ctas));
  done = 0;
  for (int w = 0; cta < ctas && w < waves; ++w) done += cost_of(plan, item_of_wave(w, cta, ctas));
  while (__syncthreads_or(cta < ctas && done > fair)) {
    --waves;
    if (cta < ctas) done -= cost_of(plan, item_of_wave(waves, cta, ctas));
  }
  return waves;
}

// total * count / shares; count and shares are at most 1024.
__device__ uint32_t share_until(uint32_t total, uint32_t count, uint32_t shares) {
  return total / shares * count + total % shares * count / shares;
}

// Cuts for as many shares as there are CTAs; the waves before them.
__device__ int cut_for_all(const Step& step, const Plan& plan, uint32_t total) {
  const int cta = threadIdx.x, ctas = step.stages.num_ctas;
  const auto until = [&](int c) { return share_until(total, c, ctas); };
  const uint32_t fair = cta < ctas ? until(cta + 1) - until(cta) : 0;
  uint32_t done;
  const int waves = count_waves(plan, ctas, fair, done);
  const uint32_t before = scan_sum(cta < ctas ? fair - done : 0, ctas).before;
  if (cta < ctas) {
    const uint32_t cost = plan.costs[waves * ctas] + before;
    plan.cuts[cta] = cut_at(plan, cost, step.stages.whole_items != 0);
  }
  if (cta == 0) {
    plan.cuts[0] = {waves * ctas, 0};
    plan.cuts[ctas] = {plan.num_items, 0};
  }
  return waves;
}

// Cuts for fewer: there is not enough to do.
__device__ void cut_for_some(const Step& step, const Plan& plan, uint32_t total, uint32_t shares) {
  for (uint32_t cta = threadIdx.x; cta <= step.stages.num_ctas; cta += kThreads) {
    plan.cuts[cta] =
        cta >= shares ? Cut{plan.num_items, 0}
                      : cut_at(plan, share_until(total, cta, shares), step.stages.whole_items != 0);
  }
}

__device__ int tiles_of(const Plan& plan, int item) {
  return static_cast<int>(cost_of(plan, item) - kItemCost) / kTileCost;
}

// Parts of an item that CTAs before this one do, and that those after it do.
__device__ int parts_before(const Plan& plan, int cta, int item) {
  int cut = cta;
  while (cut > 0 && plan.cuts[cut].divides(item)) --cut;
  return cta - cut;
}

__device__ int parts_after(const Plan& plan, int cta, int ctas, int item) {
  int cut = cta + 1;
  while (cut < ctas && plan.cuts[cut].divides(item)) ++cut;
  return cut - cta - 1;
}

// One CTA's pieces: its whole items, then its share of the others. The piece that others finish
// comes first among those: then all CTAs walk the lists from their ends in step, and each box is
// read from device memory about once.
__device__ void write_pieces(const Plan& plan, int cta, int ctas, int waves, Piece* to) {
  const Cut first = plan.cuts[cta], last = plan.cuts[cta + 1];
  for (int w = 0; w < waves; ++w) {
    const int item = item_of_wave(w, cta, ctas);
    *to++ = {item, 0, tiles_of(plan, item), 0, 1};
  }
  const int count = last.item - first.item + (last.tiles > 0), shift = last.tiles > 0;
  for (int i = 0; i < count; ++i) {
    const int item = shift && i == 0 ? last.item : first.item + i - shift;
    const int tiles = tiles_of(plan, item), done = item == first.item ? first.tiles : 0;
    const int begin = item == last.item ? tiles - last.tiles : 0;
    const int begun = parts_before(plan, cta, item);
    const int parts = begun + 1 + parts_after(plan, cta, ctas, item);
    *to++ = {item, begin, tiles - done, static_cast<int16_t>(begun), static_cast<int16_t>(parts)};
  }
}

// Pieces from cuts, CTA by CTA; nobody has arrived where they meet.
__device__ void piece_up(const Plan& plan, int ctas, int waves, int32_t* arrivals) {
  __syncthreads();
  const int cta = threadIdx.x;
  for (int i = cta; i < (ctas + 1) * kArrivals; i += kThreads) arrivals[i] = 0;
  int count = 0;
  if (cta < ctas) {
    const Cut first = plan.cuts[cta], last = plan.cuts[cta + 1];
    count = waves + last.item - first.item + (last.tiles > 0);
  }
  const Scan<int> pieces = scan_sum(count, ctas);
  if (cta < ctas) {
    plan.piece_starts[cta] = pieces.before;
    write_pieces(plan, cta, ctas, waves, plan.pieces + pieces.before);
  }
  if (cta == 0) plan.piece_starts[ctas] = pieces.total;
}

// Eight numbers, one a thread; the host reads each whole, whenever it likes. First of all: the way
// to the host's memory is long, and nobody here waits for it.
__device__ void mirror_stats(const Stages& stages) {
  constexpr int kNumbers = sizeof(Stats) / sizeof(uint64_t);
  if (stages.stats_mirror == nullptr || threadIdx.x >= kNumbers) return;
  const uint64_t number = reinterpret_cast<const uint64_t*>(stages.stats)[threadIdx.x];
  reinterpret_cast<volatile uint64_t*>(stages.stats_mirror)[threadIdx.x] = number;
}

// By one CTA.
__device__ __forceinline__ void plan_work(const Step& step, const Means* means) {
  __shared__ Near near;
  mirror_stats(step.stages);
  Plan plan = plan_of(step, near);
  order_lists(step, near, plan);
  write_items(step, plan, means);
  const uint32_t total = sum_costs(plan);
  const uint32_t ctas = step.stages.num_ctas;
  const uint32_t shares = max(1u, min(static_cast<uint32_t>(ctas), total / kLeastCost));
  int waves = 0;
  if (shares == ctas) {
    waves = cut_for_all(step, plan, total);
  } else {
    cut_for_some(step, plan, total, shares);
  }
  piece_up(plan, ctas, waves, step.stages.arrivals);
}

// The first CTA plans, the others write the rows of means, and what lists skip of them, beside it.
template <class Element>
__device__ __forceinline__ void plan_corrected(const Step& step, const Means& means) {
  ptx::wait_for_earlier();
  if (blockIdx.x == 0) return plan_work(step, &means);
  const Writers writers{static_cast<int>(blockIdx.x) - 1, static_cast<int>(gridDim.x) - 1};
  narrow_means<Element>(step, means, writers);
}

}  // namespace
}  // namespace compactattn

// One CTA of 1024 threads. Reads counters, list_spans and the lengths of the lists; writes items,
// pieces, costs and arrivals.
extern "C" __global__ void __launch_bounds__(1024, 1)
    compactattn_plan_work(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::plan_work(step, nullptr);
}

// The same with mean correction, and all that attend reads of means: 2 or more CTAs of 1024
// threads.
extern "C" __global__ void __launch_bounds__(1024, 1)
    compactattn_plan_work_means_bf16(const __grid_constant__ compactattn::Step step,
                                     const __grid_constant__ compactattn::Means means) {
  compactattn::plan_corrected<__nv_bfloat16>(step, means);
}

extern "C" __global__ void __launch_bounds__(1024, 1)
    compactattn_plan_work_means_fp16(const __grid_constant__ compactattn::Step step,
                                     const __grid_constant__ compactattn::Means means) {
  compactattn::plan_corrected<__half>(step, means);
}
