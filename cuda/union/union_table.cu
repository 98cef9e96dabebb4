// union and table: rows of scores or bits to one list each, then to the boxes it reads.
#include "union_table.cuh"

// Grid max_list_spans * lists per span x 256; dynamic shared memory 4 * mask_words bytes, and
// 4 * max_blocks more where max_blocks <= 8192. Longer rows that are merged by score need cells
// [list rows, max_blocks]. `external`: masks are given; keep_at_rows: they are those of keep_rows.
// No more than 3 CTAs an SM are asked for: for more, registers spill.
extern "C" __global__ void __launch_bounds__(256, 3)
    compactattn_union_table(const __grid_constant__ compactattn::Step step, int32_t external) {
  extern __shared__ uint32_t dynamic[];
  compactattn::union_table(step, external, dynamic);
}
