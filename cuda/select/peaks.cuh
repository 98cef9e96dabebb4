// What flashprefill's first kernel leaves for who relates its scores: L_j = log2 of the summed
// weights of block j, and the largest L of neighbours in `cells`.
#pragma once

#include <cfloat>

#include "../common/spans.cuh"
#include "../params.h"
#include "../ptx/scalar.cuh"

namespace compactattn {

constexpr int kBlocks = 128;     // of a CTA
constexpr int kPeakBlocks = 16;  // under one maximum in `cells`

// Numbers in `cells` per (span, query head).
__device__ __forceinline__ int peaks_stride(const Step& step) {
  return (step.layout.max_blocks + kBlocks - 1) / kBlocks * (kBlocks / kPeakBlocks);
}

// `row`: span * num_q_heads + query head.
__device__ __forceinline__ float* peaks_of(const Step& step, int64_t row) {
  return step.stages.cells + row * peaks_stride(step);
}

// Blocks that the maximum runs over.
__device__ __forceinline__ int blocks_of(const Step& step, const Span& span) {
  const int tokens = step.settings.relative_to_past ? span.past : span.kv_end;
  return tokens >> step.layout.log2_block_tokens;
}

// The largest L of a row; by a warp.
__device__ __forceinline__ float best_of_peaks(const Step& step, const Span& span, int64_t row) {
  const int peaks = (blocks_of(step, span) + kPeakBlocks - 1) / kPeakBlocks;
  const float* peak = peaks_of(step, row);
  float best = -FLT_MAX;
  for (int i = threadIdx.x % 32; i < peaks; i += 32) best = fmaxf(best, peak[i]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, d));
  return best;
}

// The score of a block: its weight over the best one's.
__device__ __forceinline__ float related(float l, float best) { return ptx::exp2_approx(l - best); }

}  // namespace compactattn
