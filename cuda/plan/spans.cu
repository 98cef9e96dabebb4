// batch and the first half of plan: checks each request on the device and cuts the step into spans.
//
// A refused request keeps its queries and loses its KV, so that nothing after this kernel follows a
// length or a page id that it has not seen here. What does not fit the buffers is refused too.
//
// One cluster looks through the block tables; its first CTA does the rest, a thread a request. So
// nothing in memory needs to be zero before, or right after a step that was cut short.
#include <climits>

#include "../common/spans.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/grid.cuh"
#include "cut.cuh"
#include "scan.cuh"

namespace compactattn {
namespace {

constexpr int kMaxRequests = kPlanThreads;

// Spans and items of a request, or of all requests before one. Requests that are not broken share
// no query, so there are no more spans than queries.
struct Sizes {
  int32_t lists;
  int32_t selects;
  int64_t items;
};

__device__ __forceinline__ Sizes operator+(const Sizes& a, const Sizes& b) {
  return {a.lists + b.lists, a.selects + b.selects, a.items + b.items};
}

__device__ __forceinline__ Sizes of_lane_below(const Sizes& x, int distance) {
  return {compactattn::of_lane_below(x.lists, distance),
          compactattn::of_lane_below(x.selects, distance),
          compactattn::of_lane_below(x.items, distance)};
}

__device__ __forceinline__ Sizes of_lane(const Sizes& x, int lane) {
  return {compactattn::of_lane(x.lists, lane), compactattn::of_lane(x.selects, lane),
          compactattn::of_lane(x.items, lane)};
}

// The requests, and where the spans and items of each start; INT32_MAX where they do not fit.
struct Requests {
  Request of[kMaxRequests];
  int32_t lists[kMaxRequests];
  int32_t selects[kMaxRequests];
  int32_t items[kMaxRequests];
};

// A request as the engine gives it.
struct Given {
  int32_t start;
  int32_t end;
  int32_t seq_len;
};

__device__ Given given_of(const Batch& batch, int req) {
  if (req >= batch.num_reqs) return {INT_MAX, INT_MAX, 0};
  return {batch.cu_seqlens_q[req], batch.cu_seqlens_q[req + 1], batch.seq_lens[req]};
}

__device__ bool is_length(const Step& step, int seq_len) {
  const int64_t most = static_cast<int64_t>(step.batch.table_width) << step.layout.log2_page_tokens;
  return seq_len >= 0 && seq_len <= step.layout.max_kv_len && seq_len <= most;
}

// Whether this thread finds a page outside the pool in the valid prefix of its request's row. Each
// request has as many threads of the cluster as there are for it, a power of two.
__device__ bool finds_outside(const Step& step, int& req) {
  const Batch& batch = step.batch;
  if (batch.num_reqs > kMaxRequests) return false;
  const int threads = gridDim.x * kPlanThreads, thread = blockIdx.x * kPlanThreads + threadIdx.x;
  const int log2_each = 31 - __clz(threads / max(1, batch.num_reqs));
  req = thread >> log2_each;
  if (req >= batch.num_reqs) return false;
  const Given given = given_of(batch, req);
  if (given.end <= given.start || !is_length(step, given.seq_len)) return false;
  const int32_t* row = batch.block_table + req * batch.table_stride;
  const int pages = pieces_of_log2(given.seq_len, step.layout.log2_page_tokens);
  bool outside = false;
#pragma unroll 8
  for (int i = thread & ((1 << log2_each) - 1); i < pages; i += 1 << log2_each) {
    outside |= static_cast<uint32_t>(row[i]) >= static_cast<uint32_t>(batch.num_pages);
  }
  return outside;
}

// The request of this thread. Broken where cu_seqlens_q decreases, leaves the batch or reaches back
// into the queries of an earlier request: two requests must not write the same rows.
__device__ Request checked(const Step& step, const Given& given, bool outside) {
  const auto larger = [](int a, int b) { return max(a, b); };
  const int start = given.start <= step.batch.total_q ? given.start : INT_MIN;
  const int furthest = scan(start, INT_MIN, larger, step.batch.num_reqs).before;
  if (given.start < 0 || given.end < given.start || given.end > step.batch.total_q ||
      furthest > given.start) {
    return {0, 0, 0, 1};
  }
  Request request{given.start, given.end - given.start, 0, 0};
  if (request.q_len > 0) {
    request.refused = outside || !is_length(step, given.seq_len);
    request.kv_len = request.refused ? 0 : given.seq_len;
  }
  return request;
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

// Lays out the request of this thread and counts. Sums grow with the requests, so from the first
// request that does not fit on, none with queries does.
__device__ void lay_out(const Step& step, Request request, Requests& requests, Counters& counters) {
  const Stages& stages = step.stages;
  const int req = threadIdx.x;
  const Sizes mine = sizes_of(step.layout, request.q_len);
  const Sizes at = scan_sum(mine, step.batch.num_reqs).before;
  const Sizes next = at + mine;
  const bool fits = next.lists <= stages.max_list_spans &&
                    next.selects <= stages.max_select_spans && next.items <= stages.max_items;
  if (req < step.batch.num_reqs) {
    requests.lists[req] = fits ? at.lists : INT32_MAX;
    requests.selects[req] = fits ? at.selects : INT32_MAX;
    requests.items[req] = fits ? static_cast<int>(at.items) : INT32_MAX;
    if (fits) {
      atomicMax(&counters.num_list_spans, next.lists);
      atomicMax(&counters.num_select_spans, next.selects);
      atomicMax(&counters.num_items, static_cast<int>(next.items));
    } else if (request.q_len > 0) {
      request = {request.q_start, 0, 0, 1};
    }
    if (request.refused) atomicAdd(&counters.refused, 1);
    requests.of[req] = request;
    stages.requests[req] = request;
  }
  __syncthreads();
}

__device__ void write_list_spans(const Step& step, const Requests& requests, int count) {
  const Layout& layout = step.layout;
  for (int i = threadIdx.x; i < count; i += kPlanThreads) {
    const int req = request_at(requests.lists, step.batch.num_reqs, i);
    const int index = i - requests.lists[req];
    Span span = span_of(step, requests.of[req], req, layout.list_span, index);
    const int select_size = layout.select_span > 0 ? layout.select_span : span.len;
    span.first_select = requests.selects[req] + span.first / select_size;
    span.num_selects = pieces_of(span.len, select_size);
    span.first_item =
        requests.items[req] + static_cast<int>(index * items_of(layout, layout.list_span));
    span.chunk_items = static_cast<int>(sizes_of(layout, requests.of[req].q_len).items);
    step.stages.list_spans[i] = span;
  }
}

__device__ void write_select_spans(const Step& step, const Requests& requests, int count) {
  for (int i = threadIdx.x; i < count; i += kPlanThreads) {
    const int req = request_at(requests.selects, step.batch.num_reqs, i);
    step.stages.select_spans[i] =
        span_of(step, requests.of[req], req, step.layout.select_span, i - requests.selects[req]);
  }
}

// No CTA of cells_read has taken a tile of keys.
__device__ void clear_taken(const Step& step) {
  int32_t* taken = step.stages.arrivals;
  const int counters = min(step.layout.num_kv_heads, step.stages.num_ctas * kArrivals);
  for (int i = threadIdx.x; taken && i < counters; i += kPlanThreads) taken[i] = 0;
}

// By the first CTA; `outside`: by request.
__device__ void plan_spans(const Step& step, const Given& given, const int32_t* outside) {
  __shared__ Requests requests;
  __shared__ Counters counters;
  const int num_reqs = step.batch.num_reqs;
  clear_taken(step);
  const Request mine = checked(step, given, outside[threadIdx.x]);
  if (threadIdx.x == 0) counters = {};
  __syncthreads();
  if (num_reqs <= kMaxRequests && step.batch.total_q > 0) {
    lay_out(step, mine, requests, counters);
  } else {
    for (int req = threadIdx.x; req < num_reqs; req += kPlanThreads) {
      step.stages.requests[req] = num_reqs <= kMaxRequests ? mine : Request{0, 0, 0, 1};
    }
  }
  write_list_spans(step, requests, counters.num_list_spans);
  write_select_spans(step, requests, counters.num_select_spans);
  if (threadIdx.x != 0) return;
  if (num_reqs > kMaxRequests) counters.refused = num_reqs;
  *step.stages.counters = counters;
}

}  // namespace
}  // namespace compactattn

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define COMPACTATTN_ONE_CLUSTER __cluster_dims__(8, 1, 1)
#else
#define COMPACTATTN_ONE_CLUSTER
#endif

// Grid 8 on sm_90 and later, else 1, x 1024. More than 1024 requests: none has spans, all are
// refused.
extern "C" __global__ void COMPACTATTN_ONE_CLUSTER __launch_bounds__(1024, 1)
    compactattn_plan_spans(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  __shared__ int32_t outside[kMaxRequests];
  ptx::wait_for_earlier();
  if (blockIdx.x == 0) {
    outside[threadIdx.x] = 0;
    ptx::fence_cluster();
  }
  ptx::arrive_at_cluster();
  const Given mine = given_of(step.batch, threadIdx.x);
  int req = 0;
  const bool found = finds_outside(step, req);
  ptx::wait_for_cluster();
  if (found) {
    ptx::store_to_first(outside + req, 1);
    ptx::fence_cluster();
  }
  __syncwarp();
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
  if (blockIdx.x == 0) plan_spans(step, mine, outside);
}
