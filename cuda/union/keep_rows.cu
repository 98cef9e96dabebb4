// union, first half of keeping by row: each row of scores decides for itself (rust/union.rs,
// masks_of_scores). Bits of the open region are set in every row.
#include "../ptx/grid.cuh"
#include "../select/peaks.cuh"
#include "rows.cuh"

namespace compactattn {
namespace {

// The row where all threads can read it often; `relates`: flashprefill's L become scores.
__device__ const float* held_row(const Step& step, const Span& span, int64_t row, bool relates,
                                 const float* scores, int n, float* shared) {
  if (!row_is_shared(step.layout)) return scores;
  const float best = relates ? best_of_peaks(step, span, row) : 0.0f;
  each_score(scores, 0, n,
             [&](int j, float score) { shared[j] = relates ? related(score, best) : score; });
  __syncthreads();
  return shared;
}

__device__ void keep_row(const Step& step, const Span& span, int64_t row, bool relates,
                         uint32_t* bits) {
  const Layout& layout = step.layout;
  const int past = span.past >> layout.log2_block_tokens;
  const int total = pieces_of_log2(span.kv_end, layout.log2_block_tokens);
  const bool asks = !span.dense && span.votes;
  Row scores = row_of(step.settings, step.stages.scores + row * layout.max_blocks, past);
  if (asks) {
    float* shared = shared_row(layout, bits);
    scores.scores = held_row(step, span, row, relates, scores.scores, past, shared);
    keep(step.settings, scores, bits);
  }
  const int first_open = span.dense ? 0 : min(past, total);
  uint32_t* out = step.stages.masks + row * layout.mask_words;
  for (int word = threadIdx.x; word < layout.mask_words; word += cta::kThreads) {
    const uint32_t kept =
        asks && word < words_of(past) ? bits[word] | forced_word(scores, word) : 0;
    out[word] = kept | range_word(word, first_open, total);
  }
}

}  // namespace
}  // namespace compactattn

// Grid max_select_spans * num_q_heads x 256; dynamic shared memory 4 * mask_words bytes, and
// 4 * max_blocks more where max_blocks <= 8192; then `relates` may be 1, after flashprefill alone.
extern "C" __global__ void __launch_bounds__(256, 4)
    compactattn_keep_rows(const __grid_constant__ compactattn::Step step, int32_t relates) {
  using namespace compactattn;
  ptx::wait_for_earlier();
  extern __shared__ uint32_t dynamic[];
  const int64_t row = blockIdx.x;
  const int span = static_cast<int>(row / step.layout.num_q_heads);
  const Span mine = step.stages.select_spans[span];  // of any value, but loaded beside the counter
  if (span >= step.stages.counters->num_select_spans) return;
  keep_row(step, mine, row, relates != 0, dynamic);
}
