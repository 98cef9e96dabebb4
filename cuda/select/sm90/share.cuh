// Which blocks of which (select span, KV head) a CTA reads: even shares of all there are, by chunks
// that no two CTAs split, so that what a cell holds does not depend on the share.
#pragma once

#include "../cells.cuh"
#include "traits.h"

namespace compactattn::select::sm90 {

// A CTA's part of the work: `left` chunks from chunk `chunk` of unit `unit` on.
struct Share {
  int unit;  // select span * num_kv_heads + KV head
  int chunk;
  int left;
};

template <class T>
struct SharedStorage {
  alignas(1024) uint8_t queries[T::kQueryBytes];
  alignas(1024) uint8_t keys[T::kStages][T::kKeyBytes];
  ptx::CopyBarrier full[T::kStages];
  ptx::Barrier empty[T::kStages];
  Share share;
  int chunks[T::kConsumerWarps + 1];   // of each warp's units
  int alive[T::kConsumerWarps + 1];    // of those, how many have any
  int leading[T::kConsumerWarps + 1];  // and the first that has
  const char* row_queries[T::kRows];   // null: a row of zeros
  int row_seen[T::kRows];
};

static_assert(sizeof(SharedStorage<KeyTileOf<__half, 64>>) == cells_sm90_bytes(64), "a launch's");
static_assert(sizeof(SharedStorage<KeyTileOf<__half, 128>>) == cells_sm90_bytes(128), "a launch's");
static_assert(sizeof(SharedStorage<KeyTileOf<__half, 256>>) == cells_sm90_bytes(256), "a launch's");

// Blocks of a (select span, KV head) whose cells are read: all that the tile sees, or the
// candidates and then the open blocks.
template <bool kListed>
struct Blocks {
  const int* list;  // of candidates
  int listed;
  int past;
  int count;

  Blocks() = default;

  __device__ Blocks(const Step& step, const Tile& tile, int span) {
    count = tile.blocks;
    if constexpr (kListed) {
      const int* all = candidate_list_of(step, span, tile.kv_head);
      list = all + 1;
      listed = __ldg(all);
      past = past_blocks(step.layout, tile.span);
      count += listed - past;
    }
  }

  __device__ __forceinline__ int at(int i) const {
    if constexpr (kListed) return i < listed ? __ldg(list + i) : past + i - listed;
    return i;
  }
};

// Key tiles `begin` .. `end` of a (select span, KV head).
template <bool kListed>
struct Segment {
  Tile tile;
  Blocks<kListed> blocks;
  int begin;
  int end;
};

// The (select span, KV head)s of a step, in chunks of a whole number of blocks and of key tiles.
template <class T, bool kListed>
struct Units {
  const Step& step;
  int index;  // of the tile of sampled rows

  __device__ __forceinline__ int tiles_per_chunk() const {
    return max(1, (1 << step.layout.log2_block_tokens) / T::kTokens);
  }

  // Chunks of a unit; none where it has no cells to fill.
  __device__ __forceinline__ int load(int unit, Segment<kListed>& segment) const {
    const int span = unit / step.layout.num_kv_heads;
    const int kv_head = unit - span * step.layout.num_kv_heads;
    if (!tile_at(step, index, span, kv_head, segment.tile)) return 0;
    segment.blocks = Blocks<kListed>(step, segment.tile, span);
    const int chunk_tokens = T::kTokens * tiles_per_chunk();
    const int tokens = segment.blocks.count << step.layout.log2_block_tokens;
    return (tokens + chunk_tokens - 1) / chunk_tokens;
  }

  __device__ __forceinline__ int chunks(int unit) const {
    Segment<kListed> segment;
    return load(unit, segment);
  }

  // This CTA's share; called by the whole CTA.
  __device__ Share share(SharedStorage<T>& smem) const {
    const int units = step.stages.counters->num_select_spans * step.layout.num_kv_heads;
    const int each = (units + T::kThreads - 1) / T::kThreads;
    const int first = static_cast<int>(threadIdx.x) * each, last = min(units, first + each);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int mine = 0, alive = 0, leading = units;
    for (int unit = first; unit < last; ++unit) {
      const int count = chunks(unit);
      mine += count;
      if (count > 0) ++alive, leading = min(leading, unit);
    }
    int before = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, before, d);
      if (lane >= d) before += below;
    }
    alive = __reduce_add_sync(0xffffffffu, alive);
    leading = __reduce_min_sync(0xffffffffu, leading);
    if (lane == 31) {
      smem.chunks[warp] = before;
      smem.alive[warp] = alive;
      smem.leading[warp] = leading;
    }
    if (threadIdx.x == 0) smem.share = {};
    __syncthreads();
    before -= mine;
    alive = 0;
    int64_t total = 0;
    for (int w = 0; w < T::kThreads / 32; ++w) {
      if (w < warp) before += smem.chunks[w];
      total += smem.chunks[w];
      alive += smem.alive[w];
      leading = min(leading, smem.leading[w]);
    }
    const int parts = gridDim.x / step.layout.num_kv_heads;
    if (alive == step.layout.num_kv_heads && 8 * parts * alive >= 7 * gridDim.x) {
      if (threadIdx.x == 0) smem.share = slice(leading / alive * alive, parts);
    } else {
      const int begin = static_cast<int>(total * blockIdx.x / gridDim.x);
      const int end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
      // `next` passes over the units before it.
      if (begin < end && before <= begin && begin < before + mine)
        smem.share = {first, begin - before, end - begin};
    }
    __syncthreads();
    return smem.share;
  }

  // A share of the only span, whose first unit is `unit`: one of `parts` of one KV head's chunks.
  // CTAs side by side read the same tokens of all heads, which lie together in most layouts.
  __device__ __forceinline__ Share slice(int unit, int parts) const {
    const int part = blockIdx.x / step.layout.num_kv_heads;
    if (part >= parts) return {};
    unit += blockIdx.x % step.layout.num_kv_heads;
    const int count = chunks(unit), each = (count + parts - 1) / parts;
    return {unit, part * each, min(each, count - part * each)};
  }

  // The next segment of `share`, which moves past it; false when there is none.
  __device__ __forceinline__ bool next(Share& share, Segment<kListed>& segment) const {
    while (share.left > 0) {
      const int begin = share.chunk, chunks = load(share.unit, segment);
      const int count = max(0, min(chunks - begin, share.left));
      share = {share.unit + 1, max(0, begin - chunks), share.left - count};
      segment.begin = begin * tiles_per_chunk();
      segment.end = (begin + count) * tiles_per_chunk();
      if (count > 0) return true;
    }
    return false;
  }
};

}  // namespace compactattn::select::sm90
