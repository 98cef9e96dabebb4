// select: the blocks that two_level scores again.
#include "../ptx/grid.cuh"
#include "candidates.cuh"

// Grid (num_kv_heads, max_select_spans) x 256; dynamic shared memory 4 * mask_words bytes, and
// 4 * max_blocks more where max_blocks <= 8192.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_two_level_candidates(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  extern __shared__ uint32_t dynamic[];
  const int kv_head = blockIdx.x, index = blockIdx.y;
  const Span* span = select::scored_span(step, index);
  if (span) select::choose_candidates(step, *span, index, kv_head, dynamic);
}
