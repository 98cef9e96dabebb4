// How spans, lists and heads lie to each other (rust/plan.rs), and which spans vote
// (rust/union.rs).
#pragma once

#include <cstdint>

#include "../params.h"

namespace compactattn {

// Tokens of a work item's tile.
__host__ __device__ inline int tile_tokens(const Layout& layout) {
  return 128 / layout.heads_per_list;
}

__host__ __device__ inline int lists_per_span(const Layout& layout) {
  return layout.lists_per_kv_head * layout.num_kv_heads;
}

// Tokens from a span to the next; 0 stands for the whole chunk.
__host__ __device__ inline int span_step(int tokens, int q_len) {
  return tokens > 0 ? tokens : q_len > 1 ? q_len : 1;
}

// Spans of `step` tokens, or tiles of a span.
__host__ __device__ inline int pieces_of(int q_len, int step) {
  return q_len / step + (q_len % step != 0);
}

// Pages, blocks or boxes of 2^log2 tokens.
__host__ __device__ inline int pieces_of_log2(int tokens, int log2) {
  return (tokens >> log2) + ((tokens & ((1 << log2) - 1)) != 0);
}

// The first select spans of a chunk vote, all but the last `non_voting_spans`; at least one does.
__host__ __device__ inline int voting_selects(const Step& step, int q_len) {
  const int selects = pieces_of(q_len, step.layout.select_span > 0 ? step.layout.select_span : 1);
  const int left = selects - step.settings.non_voting_spans;
  return step.settings.non_voting_spans <= 0 ? selects : left > 1 ? left : 1;
}

// What one list serves.
struct ListHeads {
  int kv_head;
  int first;  // query head
  int count;
};

// `list`: within its span.
__host__ __device__ inline ListHeads list_heads(const Layout& layout, int list) {
  const int kv_head = list / layout.lists_per_kv_head;
  const int begin = list % layout.lists_per_kv_head * layout.heads_per_list;
  const int left = layout.group_size - begin;
  return {kv_head, kv_head * layout.group_size + begin,
          left < layout.heads_per_list ? left : layout.heads_per_list};
}

}  // namespace compactattn
