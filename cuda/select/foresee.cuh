// A select span before plan_spans has written it, for a kernel that has work to do meanwhile.
//
// plan_spans alone checks a step, so what is foreseen here may not come true: of a request that it
// refuses, or whose queries are another's. Whoever works by it looks at the real span afterwards.
#pragma once

#include "../common/cta.cuh"
#include "../plan/cut.cuh"

namespace compactattn::select {

// Select span `index` as plan_spans would write it if no request were refused, its queries within
// the batch; false for one that is dense or unknown. By whole warps, a lane a request.
__device__ __forceinline__ bool foresee_span(const Step& step, int index, Span& span) {
  const Batch& batch = step.batch;
  if (batch.num_reqs > 32) return false;
  const int lane = threadIdx.x % 32;
  Request mine{};
  if (lane < batch.num_reqs) {
    const int start = batch.cu_seqlens_q[lane], end = batch.cu_seqlens_q[lane + 1];
    const int kv_len = batch.seq_lens[lane];
    const bool is_within = start >= 0 && end > start && end <= batch.total_q;
    mine = {start, is_within ? end - start : 0, kv_len, 0};
  }
  const int selects =
      mine.q_len > 0 ? pieces_of(mine.q_len, span_step(step.layout.select_span, mine.q_len)) : 0;
  const int end = cta::lane_sum<32>(selects);
  const uint32_t after = __ballot_sync(cta::kAllLanes, index < end);
  if (after == 0) return false;
  const int req = __ffs(after) - 1;
  const auto of = [&](int x) { return __shfl_sync(cta::kAllLanes, x, req); };
  const Request request{of(mine.q_start), of(mine.q_len), of(mine.kv_len), 0};
  if (request.kv_len < 0) return false;
  span = span_of(step, request, req, step.layout.select_span, index - of(end - selects));
  return !span.dense;
}

}  // namespace compactattn::select
