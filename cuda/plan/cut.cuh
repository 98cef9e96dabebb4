// A request cut into spans, and whether it is left dense (rust/plan.rs).
#pragma once

#include "../common/spans.cuh"

namespace compactattn {

// Whether the policy leaves a request dense.
__device__ __forceinline__ bool is_dense(const Step& step, const Request& request, int past) {
  const Settings& settings = step.settings;
  return settings.all_dense || request.q_len <= settings.dense_max_q_len ||
         request.kv_len < settings.dense_below_kv_len ||
         request.kv_len <= settings.dense_prefix_tokens ||
         past >> step.layout.log2_block_tokens == 0;
}

// Span `index` of request `req`, of `tokens` tokens (0 = the chunk).
__device__ __forceinline__ Span span_of(const Step& step, const Request& request, int req,
                                        int tokens, int index) {
  const int size = span_step(tokens, request.q_len);
  Span span{};
  span.req = req;
  span.first = index * size;
  span.len = min(size, request.q_len - span.first);
  span.q_start = request.q_start + span.first;
  span.kv_end = max(0, request.kv_len - (request.q_len - span.first - span.len));
  span.past = max(0, request.kv_len - request.q_len);
  span.dense = is_dense(step, request, span.past);
  const int select_size = span_step(step.layout.select_span, request.q_len);
  span.votes = span.first / select_size < voting_selects(step, request.q_len);
  return span;
}

}  // namespace compactattn
