// The order in which plan takes items. Where lists have several, the longest lists first: items of
// about one length then make up a wave, so that the CTAs that share a list start it together and
// walk it in step, and the shortest are left to even out the sums with (longest processing time
// first, Graham 1969). Where lists have few items (one a tile of queries), KV head by KV head: what
// runs at one time then reads few KV heads, whose boxes the cache keeps for all their lists.
#pragma once

#include "../params.h"
#include "scan.cuh"

namespace compactattn {

// Where an item comes among all when the lists of a chunk go KV head by KV head. `before`: the
// chunk's items in spans before this one; `at`: the item within its span, list by list; `in_span`:
// the span's items.
__device__ __forceinline__ int place_by_kv_head(const Span& span, int num_kv_heads, int before,
                                                int in_span, int at) {
  const int kv_head = at / (in_span / num_kv_heads);
  const int in_head = before / num_kv_heads + at - kv_head * (in_span / num_kv_heads);
  return span.first_item - before + kv_head * (span.chunk_items / num_kv_heads) + in_head;
}

// A list and its length, as a number that ascends where the order does: all differ.
struct ListKey {
  static constexpr int kRowBits = 10;
  static constexpr uint32_t kMostTiles = (1u << (32 - kRowBits)) - 1;
  static constexpr uint32_t kNone = ~0u;  // behind every list
  static_assert(kPlanThreads == 1 << kRowBits, "a thread for each row");

  __device__ static uint32_t of(int row, uint32_t tiles) {
    return (kMostTiles - min(tiles, kMostTiles)) << kRowBits | static_cast<uint32_t>(row);
  }

  __device__ static int row_of(uint32_t key) { return static_cast<int>(key & (kPlanThreads - 1)); }
};

// Lists that are ranked by comparing each with all: a sort of so few waits longer than it works.
constexpr int kMostRanked = 256;
constexpr int kRankers = 4;  // threads a list
static_assert(kMostRanked * kRankers <= kPlanThreads, "");

struct alignas(16) TwoLists {
  uint32_t keys[2];
  int32_t items[2];
};

// Shared memory of the order.
struct ListOrder {
  union {
    uint32_t keys[kPlanThreads];
    TwoLists two[kMostRanked / 2];
  };
  int32_t starts[kPlanThreads];  // of each list, among all items
};

// The key of rank threadIdx.x of the keys of the first `count` threads, by all of the CTA; `keys`
// [kPlanThreads] is shared memory (bitonic sort, Batcher 1968).
__device__ __forceinline__ uint32_t sort_keys(uint32_t key, uint32_t* keys, int count) {
  const int thread = threadIdx.x;
  int size = 32;
  while (size < count) size *= 2;
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      uint32_t other = key;
      if (distance >= 32) {
        __syncthreads();
        keys[thread] = key;
        __syncthreads();
        other = keys[thread ^ distance];
      } else if (thread < size) {
        other = __shfl_xor_sync(0xffffffffu, key, distance);
      }
      const bool takes_less = ((thread & run) == 0) == ((thread & distance) == 0);
      key = takes_less ? min(key, other) : max(key, other);
    }
  }
  return key;
}

// By kRankers threads a list; the keys and items of `count` lists, and of none up to a multiple of
// 32, are in `order`.
__device__ __forceinline__ void start_by_rank(uint32_t count, ListOrder& order) {
  static_assert(kRankers == 4, "two shuffles");
  const uint32_t list = threadIdx.x / kRankers, part = threadIdx.x % kRankers;
  if (threadIdx.x / 32 * 32 >= kRankers * count) return;
  const uint32_t key = order.two[list / 2].keys[list % 2];
  int before = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < count; first += 32) {
#pragma unroll
    for (uint32_t i = 0; i < 32; i += 2 * kRankers) {
      const TwoLists two = order.two[(first + i) / 2 + part];
      if (two.keys[0] < key) before += two.items[0];
      if (two.keys[1] < key) before += two.items[1];
    }
  }
  before += __shfl_xor_sync(0xffffffffu, before, 1);
  before += __shfl_xor_sync(0xffffffffu, before, 2);
  if (part == 0) order.starts[list] = before;
}

// Where the items of each of `count` lists start when longer lists come first: order.starts. List
// `threadIdx.x` has `tiles` tiles and `items` items. By kRankers threads a list, those of more than
// kMostRanked by all of the CTA.
__device__ __forceinline__ void start_longest_first(int count, uint32_t tiles, int items,
                                                    ListOrder& order) {
  const int list = threadIdx.x;
  const uint32_t key = list < count ? ListKey::of(list, tiles) : ListKey::kNone;
  if (count <= kMostRanked) {
    if (list / 32 * 32 < count) {
      order.two[list / 2].keys[list % 2] = key;
      order.two[list / 2].items[list % 2] = list < count ? items : 0;
    }
    __syncthreads();
    start_by_rank(count, order);
  } else {
    order.keys[list] = key;
    order.starts[list] = items;
    __syncthreads();
    const bool moves = __syncthreads_or(list + 1 < count && key > order.keys[list + 1]);
    const int row = moves ? ListKey::row_of(sort_keys(key, order.keys, count)) : list;
    const int before = scan_sum(list < count ? order.starts[row] : 0, count).before;
    if (list < count) order.starts[row] = before;
  }
  __syncthreads();
}

}  // namespace compactattn
