// union and table: rows of scores or bits to one list each, then to the boxes it reads.
#pragma once

#include "../ptx/grid.cuh"
#include "list.cuh"

namespace compactattn {

// One CTA a list.
__device__ __forceinline__ void union_table(const Step& step, int external, uint32_t* dynamic) {
  ptx::wait_for_earlier();
  if (blockIdx.x == 0 && threadIdx.x == 0) count_call(step.stages);
  const int per_span = lists_per_span(step.layout);
  const int index = static_cast<int>(blockIdx.x) / per_span;
  const Span span = step.stages.list_spans[index];  // of any value, but loaded beside the counter
  if (index >= step.stages.counters->num_list_spans) return;
  const int part = static_cast<int>(blockIdx.x) - index * per_span;
  write_list(step, index, span, part, external || step.settings.keep_at_rows, dynamic);
}

}  // namespace compactattn
