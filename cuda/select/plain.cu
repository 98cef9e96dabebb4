// select, streaming: the same score for every past block.
#include "../ptx/grid.cuh"
#include "tiles.cuh"

// Grid: (max_select_spans, num_q_heads) x 256.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_fill_scores(const __grid_constant__ compactattn::Step step, float value) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  Span span;
  if (!load_span(step, blockIdx.x, span)) return;
  float* scores = scores_of(step, blockIdx.x, blockIdx.y);
  const int past = past_blocks_of(step, span);
  for (int j = threadIdx.x; j < past; j += 256) scores[j] = value;
}
