// select, flashprefill, by warpgroup products: the first of the two kernels of ../flashprefill.cu,
// to the same numbers.
//
// A warpgroup keeps the means of 64 blocks in registers, in the queries' dtype, and multiplies them
// with tile after tile of query rows. Two CTAs share an SM: one's products run beside the other's
// exponentials.
#include "../../common/shared.h"
#include "../../ptx/grid.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/wgmma.cuh"
#include "../flashprefill.cuh"

namespace compactattn {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;   // query rows of one head, a tile
constexpr int kStages = 4;  // tiles of rows in shared memory
constexpr int kSpans = 2;   // of a CTA: means once for all heads of both

// Rows of a tile are cut into groups of 64 columns, each 128 bytes a row, swizzled.
constexpr int kGroupBytes = kRows * 128;

// The spans of this CTA; those without work for it have no blocks.
struct Share {
  Span spans[kSpans];
  int blocks[kSpans];
};

// Blocks of one span that a CTA has in hand.
struct Part {
  const Span& span;  // shared memory
  int span_index;
  int first;  // block
  int end;    // the span's
  int kv_head;
};

// Tile after tile of a CTA's share: rows of a head, heads of a group, spans.
struct Walk {
  const Share& share;
  int group;
  int span = -1;
  int head = 0;  // of the group
  int row = 0;   // of the span

  __device__ Walk(const Share& share, int group) : share(share), group(group) { next_span(); }

  __device__ __forceinline__ bool is_done() const { return span >= kSpans; }

  __device__ __forceinline__ bool ends_head() const { return row + kRows >= share.spans[span].len; }

  __device__ __forceinline__ void next_span() {
    for (++span; span < kSpans && share.blocks[span] == 0; ++span) {
    }
  }

  __device__ __forceinline__ void advance() {
    row = ends_head() ? 0 : row + kRows;
    if (row > 0) return;
    head = head + 1 < group ? head + 1 : 0;
    if (head == 0) next_span();
  }
};

// A warpgroup's means as left operands.
template <int kDim>
using Means = uint32_t[kDim / 16][4];

// Row of the tile of blocks that this thread's `half` of the accumulators belongs to.
__device__ __forceinline__ int block_row(int half) {
  return threadIdx.x / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
}

// Zeros from the span's end on.
template <class Element, int kDim>
__device__ __forceinline__ void load_means(const Step& step, const Part& tile, Means<kDim>& means) {
  const int64_t heads = step.layout.num_kv_heads;
  const float* rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int block = tile.first + block_row(half);
    const int64_t slot = block < tile.end ? mean_slot(step, tile.span.req, block) : 0;
    rows[half] = step.stages.k_mean + (slot * heads + tile.kv_head) * kDim;
    if (block >= tile.end) rows[half] = nullptr;
  }
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* row = rows[i % 2];
      const int column = x * 16 + i / 2 * 8 + threadIdx.x % 4 * 2;
      const float2 pair = row ? __ldg(reinterpret_cast<const float2*>(row + column)) : float2{};
      means[x][i] = pack_pair<Element>(pair.x, pair.y);
    }
  }
}

// Starts the copy of the walk's tile; zeros past the span.
template <class Element, int kDim>
__device__ __forceinline__ void load_rows(const Step& step, const Walk& walk, int kv_head,
                                          uint32_t to) {
  constexpr int kPieces = kDim / 8;  // of 16 bytes
  if (!walk.is_done()) {
    const Span& span = walk.share.spans[walk.span];
    const int head = kv_head * walk.group + walk.head;
    const int thread = ptx::not_before(threadIdx.x);
#pragma unroll
    for (int u = 0; u < kRows * kPieces / kThreads; ++u) {
      const int i = thread + u * kThreads, row = i / kPieces, piece = i % kPieces;
      const bool exists = walk.row + row < span.len;
      const Element* from =
          query_at<Element>(step, span.q_start + (exists ? walk.row + row : 0), head) + piece * 8;
      const int swizzled = piece % 8 ^ row % 8;
      ptx::copy_async_alone(to + piece / 8 * kGroupBytes + row * 128 + swizzled * 16, from, exists);
    }
  }
  ptx::commit_copies();
}

using Logits = float[kRows / 2];

// Logits of the warpgroup's blocks and kRows rows, before the scale.
template <class Element, int kDim>
__device__ __forceinline__ void multiply(Logits& c, const Means<kDim>& means, const uint8_t* rows) {
  const uint64_t right = ptx::swizzled_operand(rows);
  ptx::fence_registers(c);
  cute::warpgroup_arrive();
#pragma unroll
  for (int x = 0; x < kDim / 16; ++x) {
    const uint64_t b = ptx::advanced(right, x / 4 * kGroupBytes + x % 4 * 32);
    ptx::mma<Element, ptx::Major::K>(c, means[x], b,
                                     x == 0 ? ptx::ScaleOut::Zero : ptx::ScaleOut::One);
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
  ptx::fence_registers(c);
}

// Hides what a row does not see whole: rows below need(block), and those past the span.
__device__ __forceinline__ void hide(const Step& step, const Part& tile, int first_row, Logits& c) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int block = tile.first + block_row(half);
    const int need = ((block + 1) << step.layout.log2_block_tokens) - visible_to(tile.span, 0);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int row = first_row + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      float& x = c[i / 2 * 4 + half * 2 + i % 2];
      if (row < need || row >= tile.span.len) x = -kInfinity;
    }
  }
}

// Adds the weights of the thread's logits of each of its two blocks.
__device__ __forceinline__ void fold(LogSum (&sums)[2], const Logits& c, float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -FLT_MAX;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      most = fmaxf(most, fmaxf(c[4 * n + 2 * half], c[4 * n + 2 * half + 1]));
    }
    LogSum tile{fmaxf(most * scale, -FLT_MAX), 0.f};
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      tile.sum += ptx::exp2_approx(fmaf(c[4 * n + 2 * half], scale, -tile.max)) +
                  ptx::exp2_approx(fmaf(c[4 * n + 2 * half + 1], scale, -tile.max));
    }
    sums[half].merge(tile);
  }
}

// Writes one head's L and their maximum over the warp's blocks, in which NaN has no say; starts the
// sums anew.
__device__ __forceinline__ void finish(const Step& step, const Part& tile, int head,
                                       LogSum (&sums)[2]) {
  const int lane = threadIdx.x % 32, past = past_blocks_of(step, tile.span);
  float* scores = scores_of(step, tile.span_index, head);
  float best = -FLT_MAX;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    LogSum sum = sums[half];
    sums[half] = LogSum{};
    sum.merge(sum.of_lane(1));
    sum.merge(sum.of_lane(2));
    const int block = tile.first + block_row(half);
    const float value = sum.log2();
    if (block < tile.end) best = fmaxf(best, value);
    if (block < past && lane % 4 == 0) scores[block] = value;
  }
  best = warp_reduce(best, [](float a, float b) { return fmaxf(a, b); });
  if (lane == 0) {
    peaks_of(step, tile.span_index, head)[tile.first / kPeakBlocks + threadIdx.x / 32] = best;
  }
}

// The spans of this CTA from `first` on that have blocks for it, in shared memory.
__device__ void find_share(const Step& step, int first, int first_block, Share& share) {
  if (threadIdx.x < kSpans) {
    Span span{};
    const bool scored = load_span(step, first + threadIdx.x, span);
    const int blocks = scored ? blocks_of(step, span) : 0;
    share.spans[threadIdx.x] = span;
    share.blocks[threadIdx.x] = blocks > first_block ? blocks : 0;
  }
  __syncthreads();
}

template <class Element, int kDim>
__device__ __forceinline__ void sum_weights(const Step& step) {
  extern __shared__ __align__(1024) uint8_t stages[];
  constexpr int kStageBytes = kDim / 64 * kGroupBytes;
  static_assert(kStages * kStageBytes == flashprefill_sm90_bytes(kDim), "a launch's");
  __shared__ Share share;
  const int group = step.layout.group_size, first_span = blockIdx.x * kSpans;
  const int kv_head = blockIdx.y;
  // The last blocks of a context are few: those CTAs go first, beside others.
  const int first = (gridDim.z - 1 - blockIdx.z) * kBlocks;
  find_share(step, first_span, first, share);
  Walk walk(share, group), ahead(share, group);
  if (walk.is_done()) return;
  const uint32_t to = ptx::shared_address(stages);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    load_rows<Element, kDim>(step, ahead, kv_head, to + i * kStageBytes);
    if (!ahead.is_done()) ahead.advance();
  }
  Means<kDim> means;
  LogSum sums[2];
  int loaded_req = -1, loaded_end = 0;
  const float scale = step.layout.sm_scale * kLog2E;
  for (int i = 0; !walk.is_done(); ++i) {
    const Part tile{share.spans[walk.span], first_span + walk.span, first, share.blocks[walk.span],
                    kv_head};
    const int end = min(tile.end, first + kBlocks);
    if (loaded_req != tile.span.req || loaded_end != end) {
      loaded_req = tile.span.req;
      loaded_end = end;
      load_means<Element, kDim>(step, tile, means);
    }
    ptx::wait_copies_but<kStages - 2>();
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    load_rows<Element, kDim>(step, ahead, kv_head, to + (i + kStages - 1) % kStages * kStageBytes);
    if (!ahead.is_done()) ahead.advance();
    if (first + static_cast<int>(threadIdx.x) / 128 * 64 < end) {
      Logits c;
      multiply<Element, kDim>(c, means, stages + i % kStages * kStageBytes);
      const bool all_past = first + kBlocks <= past_blocks_of(step, tile.span);
      if (!all_past || walk.row + kRows > tile.span.len) hide(step, tile, walk.row, c);
      fold(sums, c, scale);
      if (walk.ends_head()) finish(step, tile, kv_head * group + walk.head, sums);
    }
    walk.advance();
  }
}

}  // namespace
}  // namespace compactattn

// Grid: (ceil(max_select_spans / 2), num_kv_heads, ceil(max_blocks / 128)) x 256; dynamic shared
// memory `flashprefill_sm90_bytes`. `cells` as in ../flashprefill.cu; `k_mean` is not null.
#define FLASHPREFILL(name, Element, kDim)                    \
  extern "C" __global__ void __launch_bounds__(256, 2)       \
      name(const __grid_constant__ compactattn::Step step) { \
    compactattn::ptx::wait_for_earlier();                    \
    compactattn::sum_weights<Element, kDim>(step);           \
  }

FLASHPREFILL(compactattn_flashprefill_sm90_bf16_d64, __nv_bfloat16, 64)
FLASHPREFILL(compactattn_flashprefill_sm90_bf16_d128, __nv_bfloat16, 128)
FLASHPREFILL(compactattn_flashprefill_sm90_fp16_d64, __half, 64)
FLASHPREFILL(compactattn_flashprefill_sm90_fp16_d128, __half, 128)
