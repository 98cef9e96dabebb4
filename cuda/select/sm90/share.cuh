// Which blocks of which (select span, KV head) a CTA reads: even shares of all there are, by chunks
// that no two CTAs split, so that what a cell holds does not depend on the share. Of the only units
// each CTA takes one tile after the other as it has room: memory serves some SMs a tenth slower
// than others. Where a tile has rows of two spans, neighbours of one request are read for together.
#pragma once

#include "../cells.cuh"
#include "traits.h"

namespace compactattn::select::sm90 {

// A CTA's part of the work: `left` chunks from chunk `chunk` of unit `unit` on.
struct Share {
  int unit;  // select span * num_kv_heads + KV head
  int chunk;
  int left;
  int step;    // from one of its chunks to the next
  int pooled;  // whether the unit's other chunks are there for all who work on it to take
};

// Key tiles of a unit, every `step`th from `begin` to `end`. Where CTAs take tiles, those from
// the first on that no CTA has so, up to `pool_end`, are theirs who ask.
struct Order {
  int begin;
  int end;
  int step;
  int pool_end;  // 0: none
  int kv_head;
};

template <class T>
struct SharedStorage {
  alignas(1024) uint8_t queries[T::kQueryBytes];
  alignas(1024) uint8_t keys[T::kStages][T::kKeyBytes];
  ptx::CopyBarrier full[T::kStages];
  ptx::Barrier empty[T::kStages];
  Share share;
  Share left[T::kWarps];              // of each warp, here: registers are short
  int tiles[T::kStages];              // that keys are of, where CTAs take them; none: < 0
  Order order;                        // of the warp that copies
  int chunks[T::kWarps];              // of each warp's units
  int alive[T::kWarps];               // of those, how many have any
  int leading[T::kWarps];             // and the first that has
  const char* row_queries[T::kRows];  // null: a row of zeros
};

template <int kDim, int kSpans>
constexpr bool kFits =
    sizeof(SharedStorage<KeyTileOf<__half, kDim, kSpans>>) == cells_sm90_bytes(kDim, kSpans);
static_assert(kFits<64, 1> && kFits<128, 1> && kFits<256, 1>, "a launch's");
static_assert(kFits<64, 2> && kFits<128, 2> && kFits<256, 2>, "a launch's");

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

// Key tiles from `begin` on of a unit, and one span's rows of it.
template <bool kListed>
struct Segment {
  Tile tile;  // without rows where the unit has none of that span
  Blocks<kListed> blocks;
  int begin;
  int end;
  int step;
  bool pooled;
  int chunks;

  __device__ __forceinline__ bool is_pooled() const { return !kListed && pooled; }

  __device__ __forceinline__ Order order() const {
    return {begin, end, step, pooled ? chunks : 0, tile.kv_head};
  }
};

// Of which span of a unit someone wants the rows: by number, or the last that has any, which sees
// all that those before it see.
constexpr int kLast = -1;

// The units of a step, in chunks of a whole number of blocks and of key tiles: a (select span, KV
// head), or two neighbours' and those of an only one, as many as the tile has room for.
template <class T, bool kListed>
struct Units {
  const Step& step;
  int index;  // of the tile of sampled rows
  int side = kLast;

  static_assert(T::kSpans == 1 || !kListed, "spans have candidates of their own");

  __device__ __forceinline__ int tiles_per_chunk() const {
    return max(1, (1 << step.layout.log2_block_tokens) / T::kTokens);
  }

  // Spans that are read for together with span `span`, itself the first: none where one before it
  // comes first. Counted within the request.
  __device__ __forceinline__ int spans_from(int span) const {
    if (T::kSpans == 1) return 1;
    const Span* at = step.stages.select_spans + span;
    const int each = step.layout.select_span;
    if (each > 0 && at->first / each % T::kSpans != 0) return 0;
    const int left = min(T::kSpans, step.stages.counters->num_select_spans - span);
    int count = 1;
    while (count < left && at[count].req == at->req) ++count;
    return count;
  }

  // Chunks of a unit; none where it has no cells to fill.
  __device__ __forceinline__ int load(int unit, Segment<kListed>& segment) const {
    const int first = unit / step.layout.num_kv_heads;
    const int kv_head = unit - first * step.layout.num_kv_heads, spans = spans_from(first);
    int count = 0;
    segment.tile.rows = 0;
#pragma unroll 1  // half the code to fetch before the first tile
    for (int i = 0; i < T::kSpans; ++i) {
      Tile tile;
      if (i >= spans || !tile_at(step, index, first + i, kv_head, tile)) continue;
      const Blocks<kListed> blocks(step, tile, first + i);
      count = max(count, blocks.count);
      if (side != kLast && side != i) continue;
      segment.tile = tile;
      segment.blocks = blocks;
    }
    const int chunk_tokens = T::kTokens * tiles_per_chunk();
    const int tokens = count << step.layout.log2_block_tokens;
    return (tokens + chunk_tokens - 1) / chunk_tokens;
  }

  __device__ __forceinline__ int chunks(int unit) const {
    Segment<kListed> segment;
    return load(unit, segment);
  }

  // Whether tiles can be taken one by one: whole blocks, and counted, from 0 in plan_spans on.
  __device__ __forceinline__ bool can_pool() const {
    const Stages& stages = step.stages;
    return !kListed && index == 0 && tiles_per_chunk() == 1 && stages.arrivals != nullptr &&
           step.layout.num_kv_heads <= stages.num_ctas * kArrivals;
  }

  // CTAs of this one's KV head.
  __device__ __forceinline__ int takers() const {
    const int heads = step.layout.num_kv_heads, ctas = gridDim.x, cta = blockIdx.x;
    return (ctas - 1 - cta % heads) / heads + 1;
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
    for (int w = 0; w < T::kWarps; ++w) {
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
        smem.share = {first, begin - before, end - begin, 1, false};
    }
    __syncthreads();
    return smem.share;
  }

  // A share of the only units, the first of which is `unit`: one of `parts` of one KV head's
  // chunks. CTAs side by side read the same tokens of all heads, which lie together in most
  // layouts.
  __device__ __forceinline__ Share slice(int unit, int parts) const {
    const int heads = step.layout.num_kv_heads, part = blockIdx.x / heads;
    unit += blockIdx.x % heads;
    if (can_pool()) return {unit, part, 1, takers(), true};
    if (part >= parts) return {};
    const int count = chunks(unit), each = (count + parts - 1) / parts;
    return {unit, part * each, min(each, count - part * each), 1, false};
  }

  // The warp's next segment of `left`, which moves past it; false when there is none. Where chunks
  // are there to take, each CTA has some of the first ones to begin with.
  __device__ __forceinline__ bool next(Share& left, Segment<kListed>& segment) const {
    while (left.left > 0) {
      const int chunks = load(left.unit, segment);
      __syncwarp();
      const Share share = left;
      const int count = max(0, min(chunks - share.chunk, share.left));
      segment.begin = share.chunk * tiles_per_chunk();
      segment.end = share.pooled ? min(T::kStages * share.step, chunks)
                                 : (share.chunk + count) * tiles_per_chunk();
      segment.step = share.step;
      segment.pooled = share.pooled;
      segment.chunks = chunks;
      __syncwarp();
      if (threadIdx.x % 32 == 0)
        left = {share.unit + 1, max(0, share.chunk - chunks), share.pooled ? 0 : share.left - count,
                1, false};
      __syncwarp();
      if (count > 0) return true;
    }
    return false;
  }
};

}  // namespace compactattn::select::sm90
