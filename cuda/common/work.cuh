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
  stream.count = (item.stream_len + (1 << work.log2_box_tokens) - 1) >> work.log2_box_tokens;
  stream.visible = item.stream_len - item.tokens_after;
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

// A piece with what it works on.
struct LoadedPiece {
  WorkItem item;
  Stream stream;
  int begin;
  int end;
  int part;
  int parts;
};

// The pieces of this CTA.
struct Pieces {
  int first;
  int count;

  __device__ __forceinline__ explicit Pieces(const Work& work) {
    first = work.piece_starts[blockIdx.x];
    count = work.piece_starts[blockIdx.x + 1] - first;
  }

  __device__ __forceinline__ LoadedPiece at(const Work& work, int index) const {
    const Piece piece = work.pieces[first + index];
    const WorkItem item = work.items[piece.item];
    return {item, stream_of(work, item), piece.begin, piece.end, piece.part, piece.parts};
  }
};

}  // namespace compactattn
