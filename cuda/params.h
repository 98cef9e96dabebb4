// Launch parameters of the GPU stages: plain data with fixed sizes, filled by host code of any
// language.
#pragma once

#include <cstdint>

namespace compactattn {

// One query tile over one list: `num_tokens` query tokens of the `group` heads that share the list.
struct WorkItem {
  int32_t list_row;      // row of the table
  int32_t kv_head;       // head of the KV pool that the list reads
  int32_t q_token;       // first query token, counted over the whole batch
  int32_t num_tokens;    // 1..tile rows / group
  int32_t q_head;        // first of the `group` query heads
  int32_t tokens_after;  // tokens of the list's span after `q_token`: it sees stream_len -
                         // tokens_after columns
  int32_t reserved[2];
};
static_assert(sizeof(WorkItem) == 32, "host code writes items as eight int32");

// Where one CTA's share of the items ends and the next one's starts: `tiles` of `item` are done
// before the cut, counted from the stream's end. 0 <= tiles < tiles of the item; the last cut is
// {num_items, 0}.
struct Cut {
  int32_t item;
  int32_t tiles;
};

// The lists and the items that read them; what plan, attend and combine share. All pointers are
// device memory.
struct Work {
  const WorkItem* items;  // [num_items], list row major, so that neighbours read the same boxes
  const int32_t*
      boxes;  // [rows, max_boxes], entry = page * boxes_per_page + part; < 0 reads as zeros
  const int32_t* counts;       // [rows]
  const int32_t* stream_lens;  // [rows], KV tokens of the row's boxes
  Cut* cuts;                   // [num_ctas + 1], written by plan
  int32_t* costs;              // [num_items + 1], scratch of plan
  int32_t num_items;
  int32_t num_ctas;  // of attend, at most 1024
  int32_t max_boxes;
  int32_t group;  // query heads that share a list, 1..tile rows
};
static_assert(sizeof(Work) == 64, "host code writes this layout");

// Results; strides count elements, those of `out` in multiples of 8 and `out` itself 16-byte
// aligned.
struct Results {
  void* out;           // [total_q, num_q_heads, head_dim] by the strides below
  float* lse;          // [total_q, num_q_heads] by the strides below, natural log; may be null
  float* partial_out;  // [2 * num_ctas, tile rows, head_dim], each piece divided by its own sum
  float* partial_lse;  // [2 * num_ctas, tile rows]
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
};
static_assert(sizeof(Results) == 64, "host code writes this layout");

// Everything attend reads but its three tensor maps.
struct AttendParams {
  Work work;
  Results results;
  int32_t num_pages;  // the first page id outside the pool: the copy engine fills it with zeros
  int32_t log2_box_tokens;  // at least 3, an atom of the copy's swizzle
  int32_t log2_boxes_per_page;
  float sm_scale;  // on q . k, before softmax
};
static_assert(sizeof(AttendParams) == 144, "host code writes this layout");

}  // namespace compactattn
