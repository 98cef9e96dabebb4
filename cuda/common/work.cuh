// What each CTA of attend does: which tiles of which items, and where pieces of a cut item go.
#pragma once

#include "../params.h"

namespace compactattn {

constexpr int kTileRows = 128;    // of queries
constexpr int kTileTokens = 128;  // of a stream

// What a tile of queries reads of its list.
struct Stream {
  const int32_t* boxes;
  int count;
  int visible;  // columns that the tile's first query token sees; each later one sees one more
  int tiles;
};

__device__ __forceinline__ Stream stream_of(const Work& work, const WorkItem& item) {
  Stream stream;
  stream.boxes = work.boxes + static_cast<int64_t>(item.list_row) * work.max_boxes;
  stream.count = work.counts[item.list_row];
  stream.visible = work.stream_lens[item.list_row] - item.tokens_after;
  stream.tiles = max(0, (stream.visible + item.num_tokens - 1 + kTileTokens - 1) / kTileTokens);
  return stream;
}

// A row of an item's tile of queries.
struct QueryRow {
  int token;  // of the item
  int head;   // of the item
  bool used;  // the item's; others read as zeros and are not written
};

__device__ __forceinline__ QueryRow query_row(const WorkItem& item, int heads_per_list, int row) {
  const int token = row / heads_per_list;
  const int head = row - token * heads_per_list;
  return {token, head, token < item.num_tokens && head < item.num_heads};
}

// Tiles of one item, from the tile before `end` down to `begin`.
struct Piece {
  WorkItem item;
  Stream stream;
  int begin;
  int end;
  int slot;  // of the partial results; -1: the piece is the whole item
};

// The pieces of one CTA. Each CTA has two slots: the first for a piece that others began, the
// second for one that others finish.
struct Pieces {
  Cut first;
  Cut last;
  int count;

  __device__ explicit Pieces(const Work& work) {
    first = work.cuts[blockIdx.x];
    last = work.cuts[blockIdx.x + 1];
    count = last.item - first.item + (last.tiles > 0);
  }

  // The piece that others finish comes first: then all CTAs walk the lists from their ends in step,
  // and each box is read from device memory about once.
  __device__ __forceinline__ Piece at(const Work& work, int index) const {
    const int shift = last.tiles > 0 ? 1 : 0;
    const int id = shift && index == 0 ? last.item : first.item + index - shift;
    Piece piece;
    piece.item = work.items[id];
    piece.stream = stream_of(work, piece.item);
    const int done = id == first.item ? first.tiles : 0;
    piece.end = piece.stream.tiles - done;
    piece.begin = id == last.item ? piece.stream.tiles - last.tiles : 0;
    const int slots = 2 * static_cast<int>(blockIdx.x);
    piece.slot = done > 0 ? slots : piece.begin > 0 ? slots + 1 : -1;
    return piece;
  }
};

}  // namespace compactattn
