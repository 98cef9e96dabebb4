// plan: the items of a step, and their cut into one share of equal cost for each CTA of attend.
//
// One CTA; items and cuts depend on spans and on the lengths of the lists alone, and whatever does
// not need the lengths is done before they are there. Long lists first, or KV head by KV head
// (order.cuh), then shares (share.cuh).
#include "../ptx/grid.cuh"
#include "narrow.cuh"
#include "order.cuh"
#include "share.cuh"

namespace compactattn {
namespace {

constexpr int kThreads = kPlanThreads;
constexpr int kNearSpans = 1024;  // fewer are searched in shared memory
// Longest lists first where a list's items are what shares its boxes; lists of an item or two share
// them with the other lists of their KV head instead.
constexpr int kItemsToOrder = 4;  // a list, on average
static_assert(kItemsToOrder >= kRankers, "threads for all items rank all lists");
constexpr int kHeldItems = 2;  // of a thread, in registers

// What this stage keeps at hand.
struct Near {
  NearShares shares;
  int32_t first_items[kNearSpans];  // by list span
  ListOrder order;
};

// What is planned.
struct Plan {
  Near* near;
  uint32_t* costs;  // [num_items + 1]
  int num_items;
  int num_spans;
  int num_ordered;  // lists, the longest first; 0: in another order
  bool by_kv_head;  // within a chunk
};

// Nobody has arrived where shares meet.
__device__ void clear_arrivals(const Stages& stages) {
  static_assert(kArrivals * sizeof(int32_t) == 2 * sizeof(int4), "");
  int4* arrivals = reinterpret_cast<int4*>(stages.arrivals);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * (stages.num_ctas + 1); i += kThreads) arrivals[i] = int4{};
}

__device__ int lists_per_span(const Layout& layout) {
  return layout.num_kv_heads * layout.lists_per_kv_head;
}

__device__ Plan plan_of(const Step& step, Near& near) {
  const Stages& stages = step.stages;
  Plan plan = {};
  plan.near = &near;
  plan.num_items = min(stages.counters->num_items, stages.max_items);
  plan.num_spans = stages.counters->num_list_spans;
  plan.costs =
      plan.num_items <= kNearItems ? near.shares.costs : reinterpret_cast<uint32_t*>(stages.costs);
  const int lists = plan.num_spans * lists_per_span(step.layout);
  plan.by_kv_head = plan.num_items / kItemsToOrder < lists;
  plan.num_ordered = plan.by_kv_head || lists > kThreads ? 0 : lists;
  if (plan.num_spans <= kNearSpans) {
#pragma unroll 1
    for (int i = threadIdx.x; i < plan.num_spans; i += kThreads) {
      near.first_items[i] = stages.list_spans[i].first_item;
    }
    __syncthreads();
  }
  return plan;
}

// The list span whose items include `item`: the last that starts at or before it.
__device__ int span_of(const Stages& stages, const Plan& plan, int item) {
  const bool is_near = plan.num_spans <= kNearSpans;
  int low = 0, high = plan.num_spans - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const int first =
        is_near ? plan.near->first_items[middle] : stages.list_spans[middle].first_item;
    if (first <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What the table says of a list.
struct Length {
  int boxes;
  int tokens;
};

__device__ Length length_of(const Stages& stages, int list_row) {
  return {stages.counts[list_row], stages.stream_lens[list_row]};
}

// Tokens of a list; a caller's own table may claim more than its row holds.
__device__ int tokens_of(const Layout& layout, const Length& length) {
  const int boxes = min(max(length.boxes, 0), layout.max_boxes);
  return min(length.tokens, boxes << layout.log2_box_tokens);
}

// Items of each list of a span.
__device__ int items_of(const Layout& layout, int span_len) {
  const int tile_tokens = kTileRows / layout.heads_per_list;
  return (span_len + tile_tokens - 1) / tile_tokens;
}

// The same of list `threadIdx.x`, where lists are ordered.
__device__ int items_of_list(const Step& step, const Plan& plan) {
  const int row = threadIdx.x;
  if (row >= plan.num_ordered) return 0;
  return items_of(step.layout, step.stages.list_spans[row / lists_per_span(step.layout)].len);
}

// An item, and where it comes: among all, or within its list where lists are ordered.
struct PlacedItem {
  WorkItem item;
  int at;
};

// Item `index` of the spans in order, of a span list by list, then tile by tile: all but the length
// of its stream.
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
  if (plan.num_ordered > 0) return {item, tile};
  if (!plan.by_kv_head) return {item, index};
  const int before = span.first / max(1, layout.list_span) * lists_per_span(layout) *
                     items_of(layout, layout.list_span);
  const int in_span = lists_per_span(layout) * tiles;
  const int at = index - span.first_item;
  return {item, place_by_kv_head(span, layout.num_kv_heads, before, in_span, at)};
}

// What a thread knows before the lengths of lists are there.
struct Early {
  PlacedItem items[kHeldItems];  // its first
  int items_of_list;             // of list `threadIdx.x`
};

__device__ __forceinline__ Early look_early(const Step& step, const Plan& plan) {
  Early early = {};
  early.items_of_list = items_of_list(step, plan);
#pragma unroll
  for (int i = 0; i < kHeldItems; ++i) {
    const int index = threadIdx.x + i * kThreads;
    if (index < plan.num_items) early.items[i] = item_at(step, plan, index);
  }
  return early;
}

// Lengths of the lists of this thread's first items, and where the items of each list start.
__device__ __forceinline__ void take_lengths(const Step& step, const Plan& plan, Early& early) {
  const int row = threadIdx.x;
  Length lengths[kHeldItems] = {}, mine = {};
  // All are on their way before the first is waited for.
  if (row < plan.num_ordered) mine = length_of(step.stages, row);
#pragma unroll
  for (int i = 0; i < kHeldItems; ++i) {
    if (row + i * kThreads < plan.num_items) {
      lengths[i] = length_of(step.stages, early.items[i].item.list_row);
    }
  }
  const int tiles = max(0, tokens_of(step.layout, mine)) / kTileTokens;
#pragma unroll
  for (int i = 0; i < kHeldItems; ++i) {
    early.items[i].item.stream_len = tokens_of(step.layout, lengths[i]);
  }
  if (plan.num_ordered == 0) return;
  start_longest_first(plan.num_ordered, tiles, early.items_of_list, plan.near->order);
}

// An item, and in `costs` what it costs; `means`: null without correction.
__device__ void write_item(const Step& step, const Plan& plan, const PlacedItem& placed,
                           const Means* means) {
  const WorkItem& item = placed.item;
  const int at = placed.at + (plan.num_ordered > 0 ? plan.near->order.starts[item.list_row] : 0);
  store_whole(step.stages.items + at, item);
  const int before = means ? skipped_by(*means, item).tiles(kTileTokens) : 0;
  plan.costs[at] = kItemCost + kTileCost * (before + stream_of(Work{}, item).tiles);
}

__device__ __forceinline__ void write_items(const Step& step, const Plan& plan, const Early& early,
                                            const Means* means) {
#pragma unroll
  for (int i = 0; i < kHeldItems; ++i) {
    const int index = threadIdx.x + i * kThreads;
    if (index < plan.num_items) write_item(step, plan, early.items[i], means);
  }
#pragma unroll 1
  for (int i = threadIdx.x + kHeldItems * kThreads; i < plan.num_items; i += kThreads) {
    PlacedItem placed = item_at(step, plan, i);
    const Length length = length_of(step.stages, placed.item.list_row);
    placed.item.stream_len = tokens_of(step.layout, length);
    write_item(step, plan, placed, means);
  }
  __syncthreads();
}

// One of the eight numbers of stats, on its way to the host, which reads each whole, whenever it
// likes.
struct Mirrored {
  volatile uint64_t* to;  // null: this thread has none
  uint64_t number;

  __device__ void write() const {
    if (to != nullptr) *to = number;
  }
};

// By the warp that has least to do.
__device__ Mirrored read_stats(const Stages& stages) {
  constexpr int kNumbers = sizeof(Stats) / sizeof(uint64_t);
  const int index = kThreads - 1 - static_cast<int>(threadIdx.x);
  if (stages.stats_mirror == nullptr || index >= kNumbers) return {nullptr, 0};
  return {reinterpret_cast<volatile uint64_t*>(stages.stats_mirror) + index,
          reinterpret_cast<const uint64_t*>(stages.stats)[index]};
}

// Whether spans can be read before the kernel right before this one is done: it is not plan_spans,
// as this call's own lists come from kernels between, which wait for that one before they let this
// one start. Lists of a caller have no bits here, or may leave out what they like.
__device__ bool knows_spans(const Step& step, const Means* means) {
  const bool are_own = step.stages.lists != nullptr && !(means && means->every_span);
  // Without queries there is no list, and no such kernel.
  return are_own && step.batch.num_reqs > 0 && step.batch.total_q > 0;
}

// By one CTA. All that does not need the lengths of lists is done before the wait. Attend of the
// call before, which read what is written here, was done before plan_spans began.
__device__ __forceinline__ void plan_work(const Step& step, const Means* means) {
  __shared__ Near near;
  const Stages& stages = step.stages;
  const bool is_early = knows_spans(step, means);
  if (!is_early) ptx::wait_for_earlier();
  clear_arrivals(stages);
  const Plan plan = plan_of(step, near);
  Items items = items_to_share(stages, plan.num_items, near.shares);
  Early early = look_early(step, plan);
  if (is_early) ptx::wait_for_earlier();
  const bool has_work = is_in_warps_of(max(plan.num_items, stages.num_ctas));
  const Mirrored stat = read_stats(stages);
  if (has_work) take_lengths(step, plan, early);
  stat.write();  // as early as can be: the way to the host is long, and nobody here waits for it
  if (!has_work) return;  // it would cost the others time at every barrier
  write_items(step, plan, early, means);
  // Twice, so that the compiler knows which memory it is.
  if (plan.num_items <= kNearItems) {
    items.costs = near.shares.costs;
    share_out(items, near.shares, stages);
  } else {
    items.costs = reinterpret_cast<uint32_t*>(stages.costs);
    share_out(items, near.shares, stages);
  }
}

// The first CTA plans, the others write the rows of means, and what lists skip of them, beside it.
template <class Element>
__device__ __forceinline__ void plan_corrected(const Step& step, const Means& means) {
  if (blockIdx.x == 0) return plan_work(step, &means);
  ptx::wait_for_earlier();
  const Writers writers{static_cast<int>(blockIdx.x) - 1, static_cast<int>(gridDim.x) - 1};
  narrow_means<Element>(step, means, writers);
}

}  // namespace
}  // namespace compactattn

// One CTA of 1024 threads. Reads counters, list_spans and the lengths of the lists; writes items,
// pieces, costs and arrivals.
extern "C" __global__ void __launch_bounds__(1024, 1)
    compactattn_plan_work(const __grid_constant__ compactattn::Step step) {
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
