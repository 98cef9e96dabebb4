// select, flashprefill, sm_90a: which rows a CTA multiplies with which blocks' means.
//
// The work is a line: requests, tiles of blocks, KV heads, tiles of query rows. Its unit is a
// column of kColumn blocks times kRows rows, a warpgroup's products at a time. CTAs share the line
// evenly, whatever their number, by whole runs: the rows of one head of one span, which are folded
// in order by one warpgroup, so that what a score holds does not depend on the share.
#pragma once

#include "../../common/spans.cuh"
#include "../flashprefill.cuh"

namespace compactattn::select::sm90 {

constexpr int kRows = 64;    // query rows of one head, a tile
constexpr int kColumn = 64;  // blocks of a warpgroup
constexpr int kColumns = 4;  // of a tile of blocks: warpgroups
constexpr int kThreads = 128 * kColumns;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int row_tiles_of(int tokens) { return (tokens + kRows - 1) / kRows; }

// Where a tile of rows lies in its chunk.
struct alignas(16) Rows {
  int span;  // of the chunk
  int head;  // of the group
  int row;   // of the span: the tile's first
  int len;   // the span's
};

// The queries of one request that is scored. Its spans follow each other; only the last may be
// shorter. A request's spans are all dense or none.
struct Chunk {
  int req;
  int first_span;
  int spans;
  int span_tokens;
  int q_start;
  int q_len;
  int past;    // KV tokens
  int blocks;  // the last span's, which has no fewer than those before it; none: there is no chunk

  // Of a KV head: spans, heads of the group, rows of a span.
  __device__ __forceinline__ int row_tiles(int group) const {
    const int last = q_len - (spans - 1) * span_tokens;
    return group * ((spans - 1) * row_tiles_of(span_tokens) + row_tiles_of(last));
  }

  __device__ __forceinline__ Rows rows_at(int tile, int group) const {
    const int each = group * row_tiles_of(span_tokens);
    Rows at;
    at.span = min(tile / each, spans - 1);
    at.len = min(span_tokens, q_len - at.span * span_tokens);
    const int within = tile - at.span * each, run = row_tiles_of(at.len);
    at.head = within / run;
    at.row = (within - at.head * run) * kRows;
    return at;
  }

  // The first tile from `tile` on that starts a run.
  __device__ __forceinline__ int next_run(int tile, int group) const {
    const Rows at = rows_at(tile, group);
    return at.row == 0 ? tile : tile + row_tiles_of(at.len) - at.row / kRows;
  }

  __device__ __forceinline__ int columns() const { return (blocks + kColumn - 1) / kColumn; }

  __device__ __forceinline__ int tiles() const { return (columns() + kColumns - 1) / kColumns; }

  // Of a tile of blocks. No last tile is a single column, for which rows would be copied four times
  // as often.
  __device__ __forceinline__ int first_column(int tile) const {
    if (tile >= tiles()) return columns();
    return tile + 1 < tiles() ? tile * kColumns : max(0, min(tile * kColumns, columns() - 2));
  }

  __device__ __forceinline__ int64_t units(const Layout& layout) const {
    if (blocks == 0) return 0;
    return static_cast<int64_t>(layout.num_kv_heads) * columns() * row_tiles(layout.group_size);
  }
};

// The chunk whose first span is `index`; none where that span is dense or not a first one.
__device__ inline Chunk load_chunk(const Step& step, int index) {
  Chunk chunk{};
  Span span = step.stages.select_spans[index];
  if (span.dense || span.first > 0) return chunk;
  const Request request = step.stages.requests[span.req];
  span.kv_end = request.kv_len;
  chunk.req = span.req;
  chunk.first_span = index;
  chunk.span_tokens = span_step(step.layout.select_span, request.q_len);
  chunk.spans = pieces_of(request.q_len, chunk.span_tokens);
  chunk.q_start = request.q_start;
  chunk.q_len = request.q_len;
  chunk.past = span.past;
  chunk.blocks = blocks_of(step, span);
  return chunk;
}

// Tiles of rows of a chunk that meet one tile of blocks of one KV head.
struct Segment {
  int kv_head;
  int first_column;
  int columns;
  int first_tile;  // of rows
  int tiles;       // none: the share is done
};

// What is left of a CTA's share, in shared memory.
struct Share {
  Chunk chunk;
  Segment segment;
  int64_t at;    // unit of the chunk
  int64_t left;  // units
  int64_t units[kWarps];

  // Called by all threads; thread 0 knows the share after the next barrier.
  __device__ void find(const Step& step) {
    const int spans = step.stages.counters->num_select_spans;
    const int each = (spans + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * each, last = min(spans, first + each);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t mine = 0;
    for (int i = first; i < last; ++i) mine += load_chunk(step, i).units(step.layout);
    int64_t before = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, before, d);
      if (lane >= d) before += below;
    }
    if (lane == 31) units[warp] = before;
    if (threadIdx.x == 0) left = 0;
    __syncthreads();
    before -= mine;
    int64_t total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += units[w];
      total += units[w];
    }
    const int64_t begin = total * blockIdx.x / gridDim.x;
    const int64_t end = total * (blockIdx.x + 1) / gridDim.x;
    if (begin == end || begin < before || begin >= before + mine) return;
    for (int i = first; i < last; ++i) {
      chunk = load_chunk(step, i);
      const int64_t of_chunk = chunk.units(step.layout);
      if (begin < before + of_chunk) break;
      before += of_chunk;
    }
    at = begin - before;
    left = end - begin;
  }

  // Moves to the next segment. By one thread.
  __device__ void next(const Step& step) {
    segment = {};
    while (left > 0 && segment.tiles == 0) {
      if (at == chunk.units(step.layout)) next_chunk(step);
      take(step.layout);
    }
  }

  // There is one: the share is not done.
  __device__ void next_chunk(const Step& step) {
    int index = chunk.first_span + chunk.spans;
    do chunk = load_chunk(step, index++);
    while (chunk.blocks == 0);
    at = 0;
  }

  // The share's part of the segment that `at` lies in. A run is that share's which its first unit
  // is in.
  __device__ void take(const Layout& layout) {
    const int group = layout.group_size, rows = chunk.row_tiles(group);
    const int64_t column = static_cast<int64_t>(layout.num_kv_heads) * rows;
    int tile = static_cast<int>(min(at / (kColumns * column), int64_t{chunk.tiles() - 1}));
    if (tile + 1 < chunk.tiles() && at >= chunk.first_column(tile + 1) * column) ++tile;
    segment.first_column = chunk.first_column(tile);
    segment.columns = chunk.first_column(tile + 1) - segment.first_column;
    const int64_t within = at - segment.first_column * column;
    const int all = segment.columns * rows;
    segment.kv_head = static_cast<int>(within / all);
    const int from = static_cast<int>(within - static_cast<int64_t>(segment.kv_head) * all);
    const int to = static_cast<int>(min(from + left, int64_t{all}));
    const auto run_from = [&](int unit) {
      return chunk.next_run((unit + segment.columns - 1) / segment.columns, group);
    };
    segment.first_tile = run_from(from);
    segment.tiles = run_from(to) - segment.first_tile;
    at += to - from;
    left -= to - from;
  }
};

}  // namespace compactattn::select::sm90
