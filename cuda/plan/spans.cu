// batch and the first half of plan: checks each request on the device and cuts the step into spans.
//
// A refused request keeps its queries and loses its KV, so that nothing after this kernel follows a
// length or a page id that it has not seen here. What does not fit the buffers is refused too.
#include "../common/cta.cuh"
#include "../common/spans.cuh"

namespace compactattn {
namespace {

constexpr int kMaxRequests = 1024;
constexpr int kRequestsPerThread = kMaxRequests / cta::kThreads;

// Spans and items of a request, or of all requests before one. 64 bits: garbage must not wrap.
struct Sizes {
  int64_t lists;
  int64_t selects;
  int64_t items;
};

// Where the spans and items of each request start; INT32_MAX where they do not fit.
struct Starts {
  int32_t lists[kMaxRequests];
  int32_t selects[kMaxRequests];
  int32_t items[kMaxRequests];
};

// Queries of a request; broken where cu_seqlens_q decreases, leaves the batch or reaches back into
// the queries of an earlier request: two requests must not write the same rows.
__device__ Request queries_of(const Batch& batch, int req) {
  const int start = batch.cu_seqlens_q[req], end = batch.cu_seqlens_q[req + 1];
  bool broken = start < 0 || end < start || end > batch.total_q;
  for (int i = threadIdx.x; i < req; i += cta::kThreads) {
    const int earlier = batch.cu_seqlens_q[i];
    broken |= earlier > start && earlier <= batch.total_q;
  }
  broken = __syncthreads_or(broken);
  return broken ? Request{0, 0, 0, 1} : Request{start, end - start, 0, 0};
}

// Whether length or valid prefix of the table row is out of range; the same in all threads.
__device__ bool is_refused(const Step& step, int req, int seq_len) {
  const Batch& batch = step.batch;
  const int log2_page = step.layout.log2_page_tokens;
  const int64_t most = static_cast<int64_t>(batch.table_width) << log2_page;
  if (seq_len < 0 || seq_len > step.layout.max_kv_len || seq_len > most) return true;
  const int32_t* row = batch.block_table + req * batch.table_stride;
  const int pages = pieces_of(seq_len, 1 << log2_page);
  bool outside = false;
#pragma unroll 8
  for (int i = threadIdx.x; i < pages; i += cta::kThreads) {
    outside |= static_cast<uint32_t>(row[i]) >= static_cast<uint32_t>(batch.num_pages);
  }
  return __syncthreads_or(outside);
}

__device__ void check_request(const Step& step, int req) {
  Request request = queries_of(step.batch, req);
  if (request.q_len > 0) {
    const int seq_len = step.batch.seq_lens[req];
    request.refused = is_refused(step, req, seq_len);
    request.kv_len = request.refused ? 0 : seq_len;
  }
  if (threadIdx.x == 0) step.stages.requests[req] = request;
}

// Whether this is the last CTA to come here; it sees what the others wrote before.
__device__ bool is_last(Counters* counters) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&counters->ticket, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Past the first-level cache, which may hold what a CTA before this one left there.
__device__ Request load(const Request* request) {
  return {__ldcg(&request->q_start), __ldcg(&request->q_len), __ldcg(&request->kv_len),
          __ldcg(&request->refused)};
}

__device__ int64_t items_of(const Layout& layout, int span_tokens) {
  return static_cast<int64_t>(lists_per_span(layout)) * pieces_of(span_tokens, tile_tokens(layout));
}

__device__ Sizes sizes_of(const Layout& layout, int q_len) {
  if (q_len == 0) return {0, 0, 0};
  const int step = span_step(layout.list_span, q_len);
  const int lists = pieces_of(q_len, step);
  const int64_t items =
      (lists - 1) * items_of(layout, step) + items_of(layout, q_len - (lists - 1) * step);
  return {lists, pieces_of(q_len, span_step(layout.select_span, q_len)), items};
}

__device__ Sizes sizes_before(const Sizes& mine) {
  return {cta::exclusive_sum(mine.lists).before, cta::exclusive_sum(mine.selects).before,
          cta::exclusive_sum(mine.items).before};
}

// Whether the policy leaves a request dense.
__device__ bool is_dense(const Step& step, const Request& request, int past) {
  const Settings& settings = step.settings;
  return settings.all_dense || request.q_len <= settings.dense_max_q_len ||
         request.kv_len < settings.dense_below_kv_len ||
         request.kv_len <= settings.dense_prefix_tokens ||
         past >> step.layout.log2_block_tokens == 0;
}

// Span `index` of the request, of `tokens` tokens (0 = the chunk).
__device__ Span span_of(const Step& step, int req, int tokens, int index) {
  const Request request = load(step.stages.requests + req);
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

// The last request whose spans start at or before `index`: requests without spans share the start
// of the next one.
__device__ int request_at(const int32_t* starts, int num_reqs, int index) {
  int low = 0, high = num_reqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (starts[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Fills `starts` and the counters. Sums grow with the requests, so from the first request that does
// not fit on, none with queries does.
__device__ void lay_out(const Step& step, Starts& starts, Counters& counters) {
  const Stages& stages = step.stages;
  const int begin = threadIdx.x * kRequestsPerThread;
  const int end = min(begin + kRequestsPerThread, step.batch.num_reqs);
  Sizes mine{0, 0, 0};
  for (int req = begin; req < end; ++req) {
    const Sizes sizes = sizes_of(step.layout, load(stages.requests + req).q_len);
    mine = {mine.lists + sizes.lists, mine.selects + sizes.selects, mine.items + sizes.items};
  }
  Sizes at = sizes_before(mine);
  int refused = 0;
  for (int req = begin; req < end; ++req) {
    const Request request = load(stages.requests + req);
    const Sizes sizes = sizes_of(step.layout, request.q_len);
    const Sizes next{at.lists + sizes.lists, at.selects + sizes.selects, at.items + sizes.items};
    const bool fits = next.lists <= stages.max_list_spans &&
                      next.selects <= stages.max_select_spans && next.items <= stages.max_items;
    starts.lists[req] = fits ? static_cast<int>(at.lists) : INT32_MAX;
    starts.selects[req] = fits ? static_cast<int>(at.selects) : INT32_MAX;
    starts.items[req] = fits ? static_cast<int>(at.items) : INT32_MAX;
    if (fits) {
      atomicMax(&counters.num_list_spans, static_cast<int>(next.lists));
      atomicMax(&counters.num_select_spans, static_cast<int>(next.selects));
      atomicMax(&counters.num_items, static_cast<int>(next.items));
    } else if (request.q_len > 0) {
      stages.requests[req] = {request.q_start, 0, 0, 1};
    }
    refused += request.refused || (!fits && request.q_len > 0);
    at = next;
  }
  atomicAdd(&counters.refused, refused);
  __syncthreads();
}

__device__ void write_list_spans(const Step& step, const Starts& starts, int count) {
  const Layout& layout = step.layout;
  for (int i = threadIdx.x; i < count; i += cta::kThreads) {
    const int req = request_at(starts.lists, step.batch.num_reqs, i);
    const int index = i - starts.lists[req];
    Span span = span_of(step, req, layout.list_span, index);
    const int select_size = layout.select_span > 0 ? layout.select_span : span.len;
    span.first_select = starts.selects[req] + span.first / select_size;
    span.num_selects = pieces_of(span.len, select_size);
    span.first_item =
        starts.items[req] + static_cast<int>(index * items_of(layout, layout.list_span));
    step.stages.list_spans[i] = span;
  }
}

__device__ void write_select_spans(const Step& step, const Starts& starts, int count) {
  for (int i = threadIdx.x; i < count; i += cta::kThreads) {
    const int req = request_at(starts.selects, step.batch.num_reqs, i);
    step.stages.select_spans[i] =
        span_of(step, req, step.layout.select_span, i - starts.selects[req]);
  }
}

}  // namespace
}  // namespace compactattn

// Grid max(1, num_reqs), at most 1024, x 256. `counters` are zero. More than 1024 requests: none
// has spans, all are refused.
extern "C" __global__ void __launch_bounds__(256, 1)
    compactattn_plan_spans(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  __shared__ Starts starts;
  __shared__ Counters counted;
  const int num_reqs = step.batch.num_reqs;
  if (static_cast<int>(blockIdx.x) < num_reqs) check_request(step, blockIdx.x);
  if (!is_last(step.stages.counters)) return;
  if (threadIdx.x == 0) counted = {};
  __syncthreads();
  if (num_reqs <= kMaxRequests && step.batch.total_q > 0) lay_out(step, starts, counted);
  write_list_spans(step, starts, counted.num_list_spans);
  write_select_spans(step, starts, counted.num_select_spans);
  if (threadIdx.x == 0) {
    Counters& out = *step.stages.counters;
    out.num_list_spans = counted.num_list_spans;
    out.num_select_spans = counted.num_select_spans;
    out.num_items = counted.num_items;
    out.refused = num_reqs > kMaxRequests ? num_reqs : counted.refused;
  }
}
