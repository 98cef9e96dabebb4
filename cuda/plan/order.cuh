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

// Where the items of each of `count` lists start when longer lists come first; list `threadIdx.x`
// has `tiles` tiles and `items` items. False: they are in order as they are, and `starts`
// [kPlanThreads], shared memory as `keys` is, holds nothing.
__device__ __forceinline__ bool start_longest_first(int count, uint32_t tiles, int items,
                                                    uint32_t* keys, int32_t* starts) {
  const int thread = threadIdx.x;
  const uint32_t key = thread < count ? ListKey::of(thread, tiles) : ListKey::kNone;
  keys[thread] = key;
  starts[thread] = items;
  __syncthreads();
  if (!__syncthreads_or(thread + 1 < count && key > keys[thread + 1])) return false;
  const uint32_t ranked = sort_keys(key, keys, count);
  const int row = ListKey::row_of(ranked);
  const Scan<int> sum = scan_sum(thread < count ? starts[row] : 0, count);
  __syncthreads();
  if (thread < count) starts[row] = sum.before;
  __syncthreads();
  return true;
}

}  // namespace compactattn
