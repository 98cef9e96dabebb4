// select, flashprefill, by warpgroup products: the first of the two kernels of ../flashprefill.cu.
//
// A CTA has an SM for itself. Each of its warpgroups keeps the means of 64 blocks in registers, in
// the queries' dtype, and multiplies them with tile after tile of query rows from a ring that the
// copy engine fills. A tile's exponentials run beside the next one's products, and nothing but the
// ring holds the warpgroups together.
#include "../../common/shared.h"
#include "../../ptx/grid.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/wgmma.cuh"
#include "flashprefill_share.cuh"

namespace compactattn::select::sm90 {
namespace {

constexpr int kStages = 8;  // tiles of rows in shared memory
// Tiles are asked for so many ahead. The room of the others is what warpgroups may be apart.
constexpr int kAhead = 4;
static_assert(kAhead > 1 && kAhead < kStages, "no warpgroup waits for one behind it");

// Rows of a tile are cut into groups of 64 columns, each 128 bytes a row, swizzled.
constexpr int kGroupBytes = kRows * 128;

template <int kDim>
constexpr int kTileBytes = kDim / 64 * kGroupBytes;

template <int kDim>
struct SharedStorage {
  alignas(1024) uint8_t tiles[kStages][kTileBytes<kDim>];
  ptx::CopyBarrier full[kStages];
  ptx::Barrier empty[kStages];
  // What the tiles are. A tile is folded after its stage was given back, but before the warpgroup
  // gives the same stage back again.
  Rows rows[2 * kStages];
  Share share;
};
static_assert(sizeof(SharedStorage<64>) == flashprefill_sm90_bytes(64), "a launch's");
static_assert(sizeof(SharedStorage<128>) == flashprefill_sm90_bytes(128), "a launch's");

using Logits = float[kRows / 2];

// A warpgroup's means as left operands.
template <int kDim>
using Means = uint32_t[kDim / 16][4];

// Row of the warpgroup's blocks that this thread's `half` of the accumulators belongs to.
__device__ __forceinline__ int block_row(int half) {
  return threadIdx.x / 32 % 4 * 16 + half * 8 + threadIdx.x % 32 / 4;
}

// A thread's part of the weights of one of its blocks, over 2^near.
__device__ __forceinline__ float weigh(const float* c, float scale, float near) {
  float even = 0.f, odd = 0.f;  // half the length of the chain of additions
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    even += ptx::exp2_approx(fmaf(c[4 * n], scale, -near));
    odd += ptx::exp2_approx(fmaf(c[4 * n + 1], scale, -near));
  }
  return even + odd;
}

// Which of those logits count, by their row of the tile less the thread's first.
struct Seen {
  int first;
  int end;

  __device__ __forceinline__ float of(const float* c, int i) const {
    const int row = i / 2 * 8 + i % 2;
    return row >= first && row < end ? c[i / 2 * 4 + i % 2] : -kInfinity;
  }
};

// The same of what is seen, over the largest. What is hidden is hidden twice, for to keep it takes
// registers; nothing may be written in place of logits while products run.
__device__ __forceinline__ LogSum weigh_seen(const float* c, float scale, Seen seen) {
  float most = -FLT_MAX;
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) most = fmaxf(most, seen.of(c, i));
  LogSum sum{fmaxf(most * scale, -FLT_MAX), 0.f};
  seen.first = ptx::not_before(seen.first);
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    sum.sum += ptx::exp2_approx(fmaf(seen.of(c, i), scale, -sum.max));
  }
  return sum;
}

// One CTA's share, as one of its warps sees it.
template <class Element, int kDim>
struct Worker {
  const CUtensorMap& map;
  const Step& step;
  SharedStorage<kDim>& smem;
  int warp;
  uint32_t done = 0;  // tiles of rows of the segments before
  int tiles;          // of this one

  __device__ __forceinline__ Worker(const CUtensorMap& map, const Step& step,
                                    SharedStorage<kDim>& smem)
      : map(map), step(step), smem(smem) {
    // The compiler learns that operands made of it are the same in all lanes.
    warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  }

  __device__ __forceinline__ int stage(int tile) const { return (done + tile) % kStages; }

  __device__ __forceinline__ uint32_t phase(int tile) const { return (done + tile) / kStages % 2; }

  __device__ __forceinline__ const Segment& segment() const { return smem.share.segment; }

  // First block of the warpgroup.
  __device__ __forceinline__ int first_block() const {
    return (segment().first_column + warp / 4) * kColumn;
  }

  // The assembler takes votes alone as the same in all lanes, and wants to know that products are.
  __device__ __forceinline__ bool works() const {
    return __any_sync(0xffffffffu, warp / 4 < segment().columns);
  }

  // Starts the copy of a tile of the segment, where it is this warp's turn.
  __device__ __forceinline__ void copy(int tile) {
    if (tile >= tiles || tile % kWarps != warp) return;
    if (threadIdx.x % 32 == 0) {
      const Chunk& chunk = smem.share.chunk;
      const Rows rows = chunk.rows_at(segment().first_tile + tile, step.layout.group_size);
      const int head = segment().kv_head * step.layout.group_size + rows.head;
      const int token = chunk.q_start + rows.span * chunk.span_tokens + rows.row;
      ptx::CopyBarrier& full = smem.full[stage(tile)];
      smem.empty[stage(tile)].wait(phase(tile) ^ 1);
      smem.rows[(done + tile) % (2 * kStages)] = rows;
      full.arrive_and_expect_tx(kTileBytes<kDim>);
#pragma unroll
      for (int group = 0; group < kDim / 64; ++group) {
        ptx::load(map, full, smem.tiles[stage(tile)] + group * kGroupBytes,
                  ptx::QueryBox{head, token, group}, ptx::CacheHint::EVICT_NORMAL);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void give_back(int tile) {
    if (threadIdx.x % 32 == 0) smem.empty[stage(tile)].arrive();
  }

  // Zeros past the last block.
  __device__ __forceinline__ void load_means(Means<kDim>& means) const {
    const Chunk& chunk = smem.share.chunk;
    const int64_t heads = step.layout.num_kv_heads;
    const float* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = first_block() + block_row(half);
      const int64_t slot = block < chunk.blocks ? mean_slot(step, chunk.req, block) : 0;
      rows[half] = step.stages.k_mean + (slot * heads + segment().kv_head) * kDim;
      if (block >= chunk.blocks) rows[half] = nullptr;
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

  // Starts the products of the warpgroup's blocks and a tile of rows, before the scale.
  __device__ __forceinline__ void start(int tile, const Means<kDim>& means, Logits& c) {
    smem.full[stage(tile)].wait(phase(tile));
    const uint64_t first = ptx::swizzled_operand(smem.tiles);
    const uint64_t right = ptx::advanced(first, stage(tile) * kTileBytes<kDim>);
    ptx::fence_registers(c);
    cute::warpgroup_arrive();
#pragma unroll
    for (int x = 0; x < kDim / 16; ++x) {
      const uint64_t b = ptx::advanced(right, x / 4 * kGroupBytes + x % 4 * 32);
      ptx::mma<Element, ptx::Major::K>(c, means[x], b,
                                       x == 0 ? ptx::ScaleOut::Zero : ptx::ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
  }

  // Rows below need(block) do not see a block whole; those past the span are others'.
  __device__ __forceinline__ Seen seen(const Rows& rows, int half) const {
    const Chunk& chunk = smem.share.chunk;
    const int visible = chunk.past + rows.span * chunk.span_tokens + 1;  // to the span's first row
    const int block = first_block() + block_row(half);
    const int need = ((block + 1) << step.layout.log2_block_tokens) - visible;
    const int row = rows.row + threadIdx.x % 4 * 2;
    return {need - row, rows.len - row};
  }

  // Writes a run's L and their maximum over the warp's blocks, in which NaN has no say; starts the
  // sums anew.
  __device__ __forceinline__ void finish(const Rows& rows, LogSum (&sums)[2]) const {
    const Chunk& chunk = smem.share.chunk;
    const int past = chunk.past >> step.layout.log2_block_tokens, lane = threadIdx.x % 32;
    const int span = chunk.first_span + rows.span;
    const int head = segment().kv_head * step.layout.group_size + rows.head;
    float* scores = scores_of(step, span, head);
    float best = -FLT_MAX;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float max = quad_max(sums[half].max);
      const float sum = quad_sum(sums[half].sum * ptx::exp2_approx(sums[half].max - max));
      sums[half] = LogSum{};
      const float value = max + ptx::log2_approx(sum);
      const int block = first_block() + block_row(half);
      if (block < chunk.blocks) best = fmaxf(best, value);
      if (block < past && lane % 4 == 0) scores[block] = value;
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, mask));
    }
    if (lane == 0) peaks_of(step, span, head)[first_block() / kPeakBlocks + warp % 4] = best;
  }

  // Adds the weights of the thread's logits of each of its two blocks. Where all are seen, they are
  // first weighed over the power of 2 of those before them: most of the time their sum is far from
  // the ends of a float's range, and nobody needs to know the largest.
  __device__ __forceinline__ void fold(const Rows& rows, const Logits& c, LogSum (&sums)[2]) const {
    constexpr float kFar = 0x1p60f;
    const int past = smem.share.chunk.past >> step.layout.log2_block_tokens;
    const bool sees_all = first_block() + kColumn <= past && rows.row + kRows <= rows.len;
    const float scale = step.layout.sm_scale * kLog2E;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      LogSum near{sums[half].max == -FLT_MAX ? 0.f : sums[half].max, 0.f};
      if (sees_all) near.sum = weigh(c + 2 * half, scale, near.max);
      if (near.sum > 1.f / kFar && near.sum < kFar) {
        sums[half] = {near.max, sums[half].sum + near.sum};
      } else {
        sums[half].merge(weigh_seen(c + 2 * half, scale, seen(rows, half)));
      }
    }
  }

  // Folds a tile beside the products of the next one.
  __device__ __forceinline__ void turn(int tile, const Means<kDim>& means, Logits& c, Logits& next,
                                       LogSum (&sums)[2]) {
    cute::warpgroup_wait<0>();
    ptx::fence_registers(c);
    give_back(tile);
    if (tile + 1 < tiles) start(tile + 1, means, next);
    copy(tile + kAhead);
    const Rows rows = smem.rows[(done + tile) % (2 * kStages)];
    fold(rows, c, sums);
    if (rows.row + kRows >= rows.len) finish(rows, sums);
  }

  __device__ __forceinline__ void multiply() {
    Means<kDim> means;
    load_means(means);
    Logits even, odd;
    LogSum sums[2];
    start(0, means, even);
    int tile = 0;
    do {
      turn(tile, means, even, odd, sums);
      if (tile + 1 < tiles) turn(tile + 1, means, odd, even, sums);
      tile += 2;
    } while (tile < tiles);
    // None is under way, which the assembler does not see.
    cute::warpgroup_wait<0>();
  }

  // By a warpgroup without blocks.
  __device__ __forceinline__ void pass() {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      smem.full[stage(tile)].wait(phase(tile));
      give_back(tile);
      copy(tile + kAhead);
    }
  }

  __device__ __forceinline__ void run() {
    while (true) {
      __syncthreads();  // all are done with the segment before
      if (threadIdx.x == 0) smem.share.next(step);
      __syncthreads();
      tiles = __shfl_sync(0xffffffffu, segment().tiles, 0);
      if (tiles == 0) return;
      if (warp < kAhead) copy(warp);
      if (works()) {
        multiply();
      } else {
        pass();
      }
      done += tiles;
    }
  }
};

template <class Element, int kDim>
__device__ __forceinline__ void sum_weights(const CUtensorMap& map, const Step& step) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  SharedStorage<kDim>& smem = *reinterpret_cast<SharedStorage<kDim>*>(bytes);
  if (threadIdx.x == 0) {
    ptx::prefetch(map);
    for (int i = 0; i < kStages; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  ptx::wait_for_earlier();
  smem.share.find(step);
  Worker<Element, kDim>(map, step, smem).run();
}

}  // namespace
}  // namespace compactattn::select::sm90

// Grid (any > 0) x 512: the CTAs share the work evenly, one an SM fills a GPU; dynamic shared
// memory `flashprefill_sm90_bytes`. `map`: q in boxes of 64 rows of one head. `cells` as in
// ../flashprefill.cu; `k_mean` is not null.
#define FLASHPREFILL(name, Element, kDim)                                                        \
  extern "C" __global__ void __launch_bounds__(512, 1) name(                                     \
      const __grid_constant__ CUtensorMap map, const __grid_constant__ compactattn::Step step) { \
    compactattn::select::sm90::sum_weights<Element, kDim>(map, step);                            \
  }

FLASHPREFILL(compactattn_flashprefill_sm90_bf16_d64, __nv_bfloat16, 64)
FLASHPREFILL(compactattn_flashprefill_sm90_bf16_d128, __nv_bfloat16, 128)
FLASHPREFILL(compactattn_flashprefill_sm90_fp16_d64, __half, 64)
FLASHPREFILL(compactattn_flashprefill_sm90_fp16_d128, __half, 128)
