// Launch parameters of the GPU stages: plain data with fixed sizes, filled by host code of any language.
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
  int32_t tokens_after;  // tokens of the list's span after `q_token`: it sees stream_len - tokens_after columns
  int32_t reserved[2];
};
static_assert(sizeof(WorkItem) == 32, "host code writes items as eight int32");

// Everything but the three tensor maps. All pointers are device memory; strides count elements.
struct AttendParams {
  const WorkItem* items;       // [num_items], in the order in which CTAs take them
  const int32_t* boxes;        // [rows, max_boxes], entry = page * boxes_per_page + part; < 0 reads as zeros
  const int32_t* counts;       // [rows]
  const int32_t* stream_lens;  // [rows], KV tokens of the row's boxes
  void* out;                   // [total_q, num_q_heads, head_dim] by the strides below
  float* lse;                  // [total_q, num_q_heads] by the strides below, natural log; may be null
  int64_t out_token_stride;
  int64_t out_head_stride;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  int32_t num_items;
  int32_t max_boxes;
  int32_t num_pages;           // the first page id outside the pool: the copy engine fills it with zeros
  int32_t group;               // query heads that share a list, 1..tile rows
  int32_t log2_box_tokens;
  int32_t log2_boxes_per_page;
  float sm_scale;              // on q . k, before softmax
  int32_t reserved;
};
static_assert(sizeof(AttendParams) == 112, "host code writes this layout");

}  // namespace compactattn
