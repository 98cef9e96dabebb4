// select, xattention: block mass estimated from antidiagonal samples (XAttention, arXiv
// 2503.16428; rust/select/xattention.rs says what becomes of groups that are cut).
//
// Two kernels. In the first, a key group's S tokens are one vector of S * head_dim numbers, and so
// are a query group's rows in the order the keys meet them: logits are a matrix product. It leaves
// log2 of the summed weights of each cell, a block's key groups or 128 of them, in `cells`. The
// second turns cells into masses.
#include "../common/shared.h"
#include "../ptx/grid.cuh"
#include "tiles.cuh"

namespace compactattn {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 128;   // M: key groups of a tile; also the most of a cell
constexpr int kColumns = 128;  // N: (query group, head) pairs
// Elements of a stage; 64 are a whole line of 128 bytes, 32 divide every head_dim.
template <int kDepth>
struct Stage {
  static constexpr int kPieces = kDepth / 8;  // of 16 bytes, of a row
  static constexpr int kRowBytes = 2 * kDepth + kPadBytes;
  static constexpr int kBytes = (kGroups + kColumns) * kRowBytes;
  static constexpr int kCount = kDepth == 64 ? 3 : 5;  // two CTAs fit an SM
  static constexpr int kThreadRows = kGroups * kPieces / kThreads;
};
constexpr int kSharedBytes = Stage<64>::kCount * Stage<64>::kBytes;
static_assert(kSharedBytes == xattention_bytes(), "a launch's");
static_assert(Stage<32>::kCount * Stage<32>::kBytes <= kSharedBytes, "");
constexpr int kLogitStride = kGroups + 1;  // so that neighbouring columns lie in different banks
constexpr int kMostQueryGroups = 256;      // of a span: 256 rows at stride 1
static_assert(kLogitStride * kColumns * 4 <= kSharedBytes, "logits reuse the stages");

struct Strides {
  int stride;           // S
  int query_groups;     // of a whole span
  int spans_per_cta;    // so many that their columns fill a tile
  int groups_per_cell;  // key groups
  int cells_per_block;
  int max_cells;  // of a request
};

__device__ __forceinline__ Strides strides_of(const Step& step) {
  const Layout& layout = step.layout;
  Strides x;
  x.stride = step.settings.xattention_stride;
  x.query_groups = (layout.select_span + x.stride - 1) / x.stride;
  x.spans_per_cta = max(1, kColumns / (x.query_groups * layout.group_size));
  const int per_block = (1 << layout.log2_block_tokens) / x.stride;
  x.groups_per_cell = min(kGroups, per_block);
  x.cells_per_block = per_block / x.groups_per_cell;
  x.max_cells = layout.max_blocks * x.cells_per_block;
  return x;
}

// Cells of one query group and head: [max_cells].
__device__ __forceinline__ float* cells_of(const Step& step, const Strides& x, int span, int q_head,
                                           int u) {
  const int64_t row = static_cast<int64_t>(span) * step.layout.num_q_heads + q_head;
  return step.stages.cells + (row * x.query_groups + u) * x.max_cells;
}

// What query group `u` of a span holds and sees.
struct Edge {
  int rows;   // fewer than S in the last group; 0 or less if the span has no such group
  int whole;  // whole key groups seen
  int cut;    // tokens seen of the next key group
};

__device__ __forceinline__ Edge edge_of(const Span& span, int stride, int u) {
  const int rows = min(stride, span.len - u * stride);
  const int visible = visible_to(span, u * stride + rows - 1);
  return {rows, visible / stride, visible % stride};
}

// Column of the product: head first, so that a query group's heads are neighbours.
struct Column {
  int span_index;
  int q_head;
  int u;
};

__device__ __forceinline__ Column column_of(const Step& step, const Strides& x, int first_span,
                                            int kv_head, int column) {
  const int group = step.layout.group_size, u = column / group;
  return {first_span + u / x.query_groups, kv_head * group + column % group, u % x.query_groups};
}

// What a CTA multiplies: the request's key groups from `first_group` on and up to `end_group`.
struct Product {
  int req;
  int kv_head;
  int first_span;
  int num_columns;
  int first_group;
  int end_group;
};

// Where the vectors lie that a thread copies: of some key groups and folded query groups, one token
// after the other.
template <class Element, int kDepth>
struct Cursor {
  using S = Stage<kDepth>;
  static constexpr int kRows = S::kThreadRows;

  const Element* keys[kRows];
  const Element* queries[kRows];
  // Of the query group, and times kLeft those before the walk starts over; 0 or less: there is
  // none.
  int rows[kRows];
  int token;  // of the first key group; the others follow at kStep groups
  int t;

  static constexpr int kStep = kGroups / kRows;
  static constexpr int kLeft = 1 << 16;
  static_assert(kMostQueryGroups < kLeft, "a group has no more rows than a span has groups of one");

  __device__ void start(const Step& step, const Strides& x, const Product& p, int first_column) {
    const int row = threadIdx.x / S::kPieces, piece = threadIdx.x % S::kPieces;
    token = (p.first_group + row) * x.stride;
    t = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      keys[i] = static_cast<const Element*>(step.batch.k);
      queries[i] = static_cast<const Element*>(step.batch.q);
      rows[i] = 0;
      look_up(step, x, p, i);
      const int column = first_column + row + i * kStep;
      if (column >= p.num_columns) continue;
      const Column at = column_of(step, x, p.first_span, p.kv_head, column);
      const Span span = step.stages.select_spans[at.span_index];
      const int count = max(0, min(x.stride, span.len - at.u * x.stride));
      if (count == 0) continue;
      rows[i] = count * (1 + kLeft);
      const int last = span.q_start + at.u * x.stride + count - 1;
      queries[i] = query_at<Element>(step, last, at.q_head) + piece * 8;
    }
  }

  __device__ __forceinline__ bool has_key(const Strides& x, const Product& p, int i) const {
    return token + i * kStep * x.stride < p.end_group * x.stride;
  }

  __device__ __forceinline__ void look_up(const Step& step, const Strides& x, const Product& p,
                                          int i) {
    if (!has_key(x, p, i)) return;
    const int piece = threadIdx.x % S::kPieces, at = token + i * kStep * x.stride + t;
    keys[i] = key_at<Element>(step, p.req, p.kv_head, at) + piece * 8;
  }

  // To the next token of each group: the next key, and the query row before, or the last again.
  __device__ __forceinline__ void advance(const Step& step, const Strides& x, const Product& p) {
    ++t;
    // Groups and pages start at multiples of their size: pages change at the same t in each group.
    const int page_mask = (1 << step.layout.log2_page_tokens) - 1;
    const bool new_page = t < x.stride && (t & page_mask) == 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      keys[i] += step.batch.k_token_stride;
      if (new_page) look_up(step, x, p, i);
      queries[i] -= step.batch.q_token_stride;
      rows[i] -= kLeft;
      const int count = rows[i] < kLeft ? rows[i] & (kLeft - 1) : 0;
      queries[i] += count * step.batch.q_token_stride;
      rows[i] += count * kLeft;
    }
  }

  // Starts the copy of elements `from` .. + kDepth of this thread's rows.
  __device__ __forceinline__ void copy(const Strides& x, const Product& p, int from,
                                       uint32_t to) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t at = to + i * kStep * S::kRowBytes;
      ptx::copy_async_alone(at, keys[i] + from, has_key(x, p, i));
      ptx::copy_async_alone(at + kGroups * S::kRowBytes, queries[i] + from, rows[i] > 0);
    }
  }
};

using Accumulators = float[2][8][4];  // of a warp's 32 key groups x 64 columns

// Dot products of a tile of key groups with kColumns columns from `first_column` on.
template <class Element, int kDepth>
__device__ void multiply_tile(const Step& step, const Strides& x, const Product& p,
                              int first_column, uint32_t shared, Accumulators& c) {
  using S = Stage<kDepth>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head_dim = step.layout.head_dim, steps = x.stride * head_dim / kDepth;
  const uint32_t to =
      shared + threadIdx.x / S::kPieces * S::kRowBytes + threadIdx.x % S::kPieces * 16;
  Cursor<Element, kDepth> cursor;
  cursor.start(step, x, p, first_column);
  int from = 0;
  auto load = [&](int index) {
    if (index < steps) {
      cursor.copy(x, p, from, to + index % S::kCount * S::kBytes);
      from += kDepth;
      if (from == head_dim) {
        cursor.advance(step, x, p);
        from = 0;
      }
    }
    ptx::commit_copies();
  };
  for (int i = 0; i < S::kCount - 1; ++i) load(i);
  const uint32_t a = shared + warp % 4 * 32 * S::kRowBytes + offset_a(lane, S::kRowBytes);
  const uint32_t b =
      shared + (kGroups + warp / 4 * 64) * S::kRowBytes + offset_b(lane, S::kRowBytes);
  for (int i = 0; i < steps; ++i) {
    ptx::wait_copies_but<S::kCount - 2>();
    __syncthreads();  // stage i is here, and stage i - 1 has been read
    load(i + S::kCount - 1);
    const uint32_t stage = i % S::kCount * S::kBytes;
#pragma unroll
    for (int deep = 0; deep < kDepth; deep += 16) {
      uint32_t columns[4][4];
      load_b(columns, b + stage + 2 * deep, S::kRowBytes);
      multiply_32<Element>(c, a + stage + 2 * deep, S::kRowBytes, columns);
    }
  }
  ptx::wait_copies_but<0>();
  __syncthreads();
}

// Leaves the logits of a tile in shared memory, [kColumns, kLogitStride].
__device__ void store_logits(const Accumulators& c, float scale, float* logits) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % 4 * 32 + lane / 4, column = warp / 4 * 64 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (column + n * 8 + i % 2) * kLogitStride + row + m * 16 + i / 2 * 8;
        logits[at] = c[m][n][i] * scale;
      }
    }
  }
  __syncthreads();
}

// Two threads a column: log2 of the weights of each cell, as far as the query group sees.
__device__ void write_cells(const Step& step, const Strides& x, const Product& p, int first_column,
                            const float* logits) {
  const int column = threadIdx.x % kColumns;
  if (first_column + column >= p.num_columns) return;
  const Column at = column_of(step, x, p.first_span, p.kv_head, first_column + column);
  const Edge edge = edge_of(step.stages.select_spans[at.span_index], x.stride, at.u);
  if (edge.rows <= 0) return;
  float* cells = cells_of(step, x, at.span_index, at.q_head, at.u);
  const int end = min(kGroups, edge.whole - p.first_group);
  for (int first = threadIdx.x / kColumns * x.groups_per_cell; first < end;
       first += 2 * x.groups_per_cell) {
    const float* row = logits + column * kLogitStride;
    const int last = min(end, first + x.groups_per_cell);
    float most = -FLT_MAX, sum = 0.f;
    for (int v = first; v < last; ++v) most = fmaxf(most, row[v]);
    for (int v = first; v < last; ++v) sum += ptx::exp2_approx(row[v] - most);
    cells[(p.first_group + first) / x.groups_per_cell] = most + log2f(sum);
  }
}

template <class Element>
__device__ void weigh_cells(const Step& step) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Strides x = strides_of(step);
  Span span;
  if (!load_span(step, blockIdx.x, span)) return;
  const int ordinal = span.first / step.layout.select_span;
  if (ordinal % x.spans_per_cta) return;  // an earlier span's CTA serves this one
  const int q_len = step.stages.requests[span.req].q_len;
  const int left = (q_len - span.first + step.layout.select_span - 1) / step.layout.select_span;
  const int spans = min(left, x.spans_per_cta);
  Product p;
  p.req = span.req;
  p.kv_head = blockIdx.z;
  p.first_span = blockIdx.x;
  p.num_columns = spans * x.query_groups * step.layout.group_size;
  p.first_group = blockIdx.y * kGroups;
  p.end_group = step.stages.select_spans[blockIdx.x + spans - 1].kv_end / x.stride;
  if (p.first_group >= p.end_group) return;
  float* logits = reinterpret_cast<float*>(shared);
  const float scale = step.layout.sm_scale * kLog2E / x.stride;
  for (int first = 0; first < p.num_columns; first += kColumns) {
    Accumulators c = {};
    if (step.layout.head_dim % 64 == 0) {
      multiply_tile<Element, 64>(step, x, p, first, ptx::shared_address(shared), c);
    } else {
      multiply_tile<Element, 32>(step, x, p, first, ptx::shared_address(shared), c);
    }
    store_logits(c, scale, logits);
    write_cells(step, x, p, first, logits);
    __syncthreads();  // the next tile's stages overwrite the logits
  }
}

// One warp: base-2 logit of the key group that query group `u` sees in part.
template <class Element>
__device__ float cut_logit(const Step& step, const Span& span, int q_head, int u,
                           const Edge& edge) {
  const int stride = step.settings.xattention_stride, head_dim = step.layout.head_dim;
  const int last = span.q_start + u * stride + edge.rows - 1;
  float sum = 0.f;
  for (int t = 0; t < edge.cut; ++t) {
    const Element* key =
        key_at<Element>(step, span.req, q_head / step.layout.group_size, edge.whole * stride + t);
    const Element* query = query_at<Element>(step, last - t % edge.rows, q_head);
    for (int i = threadIdx.x % 32; i < head_dim; i += 32) {
      sum = fmaf(float(key[i]), float(query[i]), sum);
    }
  }
  return warp_sum(sum) * (step.layout.sm_scale * kLog2E / edge.cut);
}

// How cells of one query group become masses: 2^(cell - top) * weight.
struct Measure {
  float top;
  float weight;
};

// One warp. NaN in one cell makes NaN of the whole row: none can be judged.
template <class Element>
__device__ Measure measure(const Step& step, const Strides& x, const Span& span, int u) {
  const int lane = threadIdx.x % 32;
  const Edge edge = edge_of(span, x.stride, u);
  const float* cells = cells_of(step, x, blockIdx.x, blockIdx.y, u);
  const int count = (edge.whole + x.groups_per_cell - 1) / x.groups_per_cell;
  float top = -kInfinity, total = 0.f, cut = -kInfinity;
  if (edge.cut > 0) top = cut = cut_logit<Element>(step, span, blockIdx.y, u, edge);
  for (int i = lane; i < count; i += 32) top = max_or_nan(top, cells[i]);
  top = warp_reduce(top, max_or_nan);
  for (int i = lane; i < count; i += 32) total += ptx::exp2_approx(cells[i] - top);
  total = warp_sum(total);
  if (edge.cut > 0) total += ptx::exp2_approx(cut - top) * edge.cut / x.stride;
  return {top, static_cast<float>(edge.rows) / span.len / total};
}

template <class Element>
__device__ void sum_masses(const Step& step) {
  __shared__ Measure measures[kMostQueryGroups];
  const Strides x = strides_of(step);
  Span span;
  if (!load_span(step, blockIdx.x, span)) return;
  const int query_groups = (span.len + x.stride - 1) / x.stride;
  for (int u = threadIdx.x / 32; u < query_groups; u += kThreads / 32) {
    const Measure found = measure<Element>(step, x, span, u);
    if (threadIdx.x % 32 == 0) measures[u] = found;
  }
  __syncthreads();
  float* scores = scores_of(step, blockIdx.x, blockIdx.y);
  const int past = past_blocks_of(step, span);
  for (int j = threadIdx.x; j < past; j += kThreads) {
    float score = 0.f;
    for (int u = 0; u < query_groups; ++u) {
      const float* cells = cells_of(step, x, blockIdx.x, blockIdx.y, u) + j * x.cells_per_block;
      float mass = 0.f;
      for (int i = 0; i < x.cells_per_block; ++i) {
        mass += ptx::exp2_approx(cells[i] - measures[u].top);
      }
      score = fmaf(mass, measures[u].weight, score);
    }
    scores[j] = clamp_unit(score);  // rounding may carry a sum past 1
  }
}

}  // namespace
}  // namespace compactattn

// Grid: (max_select_spans, ceil(ceil(max_kv_len / S) / 128), num_kv_heads) x 256; dynamic shared
// memory `xattention_bytes`. `cells`: [max_select_spans, num_q_heads, ceil(select_span / S),
// max_blocks * max(1, block / S / 128)]. select_span is 1..256.
extern "C" __global__ void __launch_bounds__(256, 2)
    compactattn_xattention_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::weigh_cells<__nv_bfloat16>(step);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    compactattn_xattention_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::weigh_cells<__half>(step);
}

// After the kernel of the same type. Grid: (max_select_spans, num_q_heads) x 256.
extern "C" __global__ void __launch_bounds__(256)
    compactattn_xattention_mass_bf16(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::sum_masses<__nv_bfloat16>(step);
}

extern "C" __global__ void __launch_bounds__(256)
    compactattn_xattention_mass_fp16(const __grid_constant__ compactattn::Step step) {
  compactattn::ptx::wait_for_earlier();
  compactattn::sum_masses<__half>(step);
}
