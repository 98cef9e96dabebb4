// table by itself, from given lists.
#include "../ptx/grid.cuh"
#include "row.cuh"

// Grid max_list_spans * lists per span x 256, no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_table(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  const int64_t row = blockIdx.x;
  const int span = static_cast<int>(row / lists_per_span(step.layout));
  const Span mine = step.stages.list_spans[span];  // of any value, but loaded beside the counter
  if (span >= step.stages.counters->num_list_spans) return;
  write_table_row(step, mine, row, step.stages.lists + row * step.layout.mask_words);
}
