// union and table: rows of scores or bits to one list each, then to the boxes it reads.
#include "../ptx/grid.cuh"
#include "list.cuh"

// Grid max_list_spans * lists per span x 256; dynamic shared memory 4 * mask_words bytes, and
// 4 * max_blocks more where max_blocks <= 8192. Longer rows that are merged by score need cells
// [list rows, max_blocks]. `external`: masks are given; keep_at_rows: they are those of keep_rows.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_union_table(const __grid_constant__ compactattn::Step step, int32_t external) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  extern __shared__ uint32_t dynamic[];
  if (blockIdx.x == 0 && threadIdx.x == 0) count_call(step.stages);
  const int per_span = lists_per_span(step.layout);
  const int index = static_cast<int>(blockIdx.x) / per_span;
  const Span span = step.stages.list_spans[index];  // of any value, but loaded beside the counter
  if (index >= step.stages.counters->num_list_spans) return;
  const int part = static_cast<int>(blockIdx.x) - index * per_span;
  write_list(step, index, span, part, external || step.settings.keep_at_rows, dynamic);
}
