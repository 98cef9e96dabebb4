// Lists in the forms other paged kernels take (rust/export.rs): plain data with fixed sizes,
// mirrored in rust/cuda/export.rs. All pointers are device memory.
#pragma once

#include <cstdint>

namespace compactattn {

// `rows` is the most list rows that a step of these extents can have: those after the step's own
// become empty.
struct PaddedTables {
  int32_t* counts;    // [rows] pages a row holds
  int32_t* seq_lens;  // [rows] KV tokens in those pages
  int32_t* pages;     // [rows, width]; entries from counts[row] on become 0
  int32_t rows;
  int32_t width;  // at least the pages of the longest request
};
static_assert(sizeof(PaddedTables) == 32, "host code writes this layout");

struct CsrTables {
  int32_t* indptr;         // [rows + 1]
  int32_t* indices;        // as many as `rows` rows of the longest request can have
  int32_t* last_page_len;  // [rows] tokens of a row's last page; 0 for an empty row
  int32_t rows;
  int32_t reserved;
};
static_assert(sizeof(CsrTables) == 32, "host code writes this layout");

}  // namespace compactattn
