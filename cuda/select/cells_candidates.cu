// select: the blocks that two_level scores again (rust/select/two_level.rs, candidates): of each
// head the forced blocks and the best others, ceil(candidate_share * past blocks) together, ORed
// over the heads of a KV head; as bits and as a list.
//
// Grid (num_kv_heads, max_select_spans) x 1024. Radix select by bytes of the ordered score and,
// where scores tie at the edge, of the block, lower first: integer counts only, so one answer.
#include "../ptx/grid.cuh"
#include "cells.cuh"

namespace compactattn::select {
namespace {

constexpr int kSelectThreads = 1024;
constexpr int kHeads = 8;  // selected at once, by one pass over their scores
constexpr int kBins = 256;
constexpr int kBatch = 6;  // loads under way of a thread; eight spill from the 64 registers of 1024

// Where one head's best blocks end: taken are those of a greater score, and those of the same score
// whose ~block is not less than `block`.
struct Edge {
  uint32_t score;  // ordered; bytes not yet searched are 0
  uint32_t block;
  int wanted;  // blocks still to find among those that match so far
  int equal;   // how many those are
};

// The past blocks of one head.
struct Ranking {
  const float* scores;
  int blocks;
  int sink;
  int local;

  __device__ __forceinline__ bool is_forced(int j) const { return j < sink || blocks - j <= local; }

  // Greater for better scores; NaN is the best.
  __device__ __forceinline__ uint32_t score(int64_t j) const {
    const uint32_t bits = __float_as_uint(isnan(scores[j]) ? INFINITY : scores[j]);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }

  __device__ __forceinline__ bool takes(const Edge& edge, int j, uint32_t score) const {
    return is_forced(j) || score > edge.score ||
           (score == edge.score && ~static_cast<uint32_t>(j) >= edge.block);
  }
};

using Bins = int[kHeads][kBins];

// What of a block's rank one pass looks at: a byte of its score, or of ~block where scores tie.
struct Digit {
  int shift;
  bool of_block;

  // Whether the edge is not yet found.
  __device__ __forceinline__ bool moves(const Edge& edge) const {
    return edge.wanted > 0 && (!of_block || edge.wanted < edge.equal);
  }

  // Counts every `members`-th block from `member` on.
  __device__ __forceinline__ void count(const Ranking& row, const Edge& edge, int member,
                                        int members, int (&bins)[kBins]) const {
    for (int from = member; from < row.blocks; from += members * kBatch) {
      uint32_t scores[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        scores[i] = row.score(min(from + i * members, row.blocks - 1));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) add(row, edge, from + i * members, scores[i], bins);
    }
  }

  __device__ __forceinline__ void add(const Ranking& row, const Edge& edge, int j, uint32_t score,
                                      int (&bins)[kBins]) const {
    if (j >= row.blocks || row.is_forced(j) || (of_block && score != edge.score)) return;
    const uint32_t key = of_block ? ~static_cast<uint32_t>(j) : score;
    const uint32_t known = of_block ? edge.block : edge.score;
    // A shift by 32 would not clear the word.
    const bool matches = shift == 24 || (key ^ known) >> (shift + 8) == 0;
    if (matches) atomicAdd(&bins[key >> shift & (kBins - 1)], 1);
  }

  // Moves the edge into the bin in which the wanted blocks end; by one warp.
  __device__ __forceinline__ void narrow(const int (&bins)[kBins], Edge& edge) const {
    constexpr int kEach = kBins / 32;
    const int lane = threadIdx.x % 32;
    const int top = kBins - 1 - lane * kEach;  // lane 0 holds the greatest keys
    int mine = 0;
    for (int b = 0; b < kEach; ++b) mine += bins[top - b];
    int before = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int above = __shfl_up_sync(0xffffffffu, before, d);
      if (lane >= d) before += above;
    }
    before -= mine;
    const int wanted = edge.wanted;
    __syncwarp();
    if (before >= wanted || before + mine < wanted) return;
    int bin = top;
    while (before + bins[bin] < wanted) before += bins[bin--];
    (of_block ? edge.block : edge.score) |= static_cast<uint32_t>(bin) << shift;
    edge.wanted = wanted - before;
    edge.equal = bins[bin];
  }
};

// One pass over the scores of `heads` heads, `stride` apart; called by the whole CTA.
__device__ void search(const Digit& digit, Ranking row, int64_t stride, int heads,
                       Edge (&edges)[kHeads]) {
  __shared__ Bins bins;
  for (int i = threadIdx.x; i < kHeads * kBins; i += kSelectThreads) bins[i / kBins][i % kBins] = 0;
  __syncthreads();
  // Heads side by side, as many warps each as there are: one latency of memory a pass, not one a
  // head.
  const int warp = threadIdx.x / 32, warps = kSelectThreads / 32 / heads;
  int h = warp / warps;
  if (h < heads && digit.moves(edges[h])) {
    row.scores += h * stride;
    digit.count(row, edges[h], static_cast<int>(threadIdx.x) - h * warps * 32, warps * 32, bins[h]);
  }
  __syncthreads();
  h = warp;
  if (h < heads && digit.moves(edges[h])) digit.narrow(bins[h], edges[h]);
  __syncthreads();
}

// Ors the best blocks of `heads` heads into `words`, or stores them where `is_first`.
__device__ void select_best(const Ranking& row, int64_t stride, int heads, int wanted,
                            uint32_t* words, bool is_first) {
  __shared__ Edge edges[kHeads];
  // The edge of a head that wants nothing more lies above every score.
  if (threadIdx.x < kHeads)
    edges[threadIdx.x] = {wanted > 0 ? 0u : ~0u, 0u, wanted, row.blocks + 1};
  __syncthreads();
  for (int shift = 24; shift >= 0; shift -= 8) search({shift, false}, row, stride, heads, edges);
  bool ties = false;
  for (int h = 0; h < heads; ++h) ties |= wanted > 0 && edges[h].wanted < edges[h].equal;
  for (int shift = 24; ties && shift >= 0; shift -= 8) {
    search({shift, true}, row, stride, heads, edges);
  }
  for (int word = threadIdx.x / 32; word < (row.blocks + 31) / 32; word += kSelectThreads / 32) {
    const int j = word * 32 + threadIdx.x % 32;
    uint32_t scores[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      scores[h] = h < heads ? row.score(h * stride + min(j, row.blocks - 1)) : 0;
    }
    bool taken = false;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) taken |= h < heads && row.takes(edges[h], j, scores[h]);
    taken = taken && j < row.blocks;
    const uint32_t bits = __ballot_sync(0xffffffffu, taken);
    if (threadIdx.x % 32 == 0) words[word] = is_first ? bits : words[word] | bits;
  }
  __syncthreads();
}

// Lists the bits of `words`, ascending, after how many they are.
__device__ void list_bits(const uint32_t* words, int blocks, int* list) {
  __shared__ int counts[kSelectThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_words = (blocks + 31) / 32;
  int done = 0;
  for (int first = 0; first < num_words; first += kSelectThreads / 32) {
    const uint32_t bits = first + warp < num_words ? words[first + warp] : 0;
    if (lane == 0) counts[warp] = __popc(bits);
    __syncthreads();
    const int count = counts[lane];
    const int before = __reduce_add_sync(0xffffffffu, lane < warp ? count : 0);
    const int rank = done + before + __popc(bits & ((1u << lane) - 1));
    if (bits >> lane & 1) list[1 + rank] = (first + warp) * 32 + lane;
    done += __reduce_add_sync(0xffffffffu, count);
    __syncthreads();
  }
  if (threadIdx.x == 0) list[0] = done;
}

// ceil(share * n), at most n; the last bit of an f32 share must not buy a block
// (rust/select/keep.rs, blocks).
__device__ int blocks_of(float share, int n) {
  if (share >= 1.0f) return n;
  const double product = static_cast<double>(share) * n * (1.0 - static_cast<double>(FLT_EPSILON));
  return min(static_cast<int>(ceil(product)), n);
}

}  // namespace
}  // namespace compactattn::select

extern "C" __global__ void __launch_bounds__(1024)
    compactattn_two_level_candidates(const __grid_constant__ compactattn::Step step) {
  using namespace compactattn;
  using namespace compactattn::select;
  ptx::wait_for_earlier();
  const int kv_head = blockIdx.x, span_index = blockIdx.y;
  const Span* span = scored_span(step, span_index);
  if (!span) return;
  const Layout& layout = step.layout;
  const Settings& settings = step.settings;
  const int n = past_blocks(layout, *span);
  const int64_t sink_and_local = static_cast<int64_t>(settings.sink_blocks) + settings.local_blocks;
  const int forced = static_cast<int>(min(sink_and_local, static_cast<int64_t>(n)));
  const int wanted = max(blocks_of(settings.candidate_share, n), forced) - forced;
  const int64_t unit = static_cast<int64_t>(span_index) * layout.num_q_heads;
  uint32_t* words = candidates_of(step, span_index, kv_head);
  for (int h = 0; h < layout.group_size; h += kHeads) {
    const int64_t first = unit + kv_head * layout.group_size + h;
    const Ranking row{step.stages.scores + first * layout.max_blocks, n, settings.sink_blocks,
                      settings.local_blocks};
    select_best(row, layout.max_blocks, min(kHeads, layout.group_size - h), wanted, words, h == 0);
  }
  list_bits(words, n, candidate_list_of(step, span_index, kv_head));
}
