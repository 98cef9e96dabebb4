// What the scoring kernels share: where keys and queries lie, and tiles of them in shared memory.
#pragma once

#include "../common/e4m3.cuh"
#include "../common/math.cuh"
#include "../common/shared.h"
#include "../params.h"
#include "../ptx/mma.cuh"

namespace compactattn::select {

// Bytes between rows of a tile in shared memory.
__device__ __forceinline__ uint32_t pitch_of(const Layout& layout) {
  return row_bytes(layout.head_dim);
}

using ptx::shared_address;

// Past blocks of a span: those that have a score.
__device__ __forceinline__ int past_blocks(const Layout& layout, const Span& span) {
  return span.past >> layout.log2_block_tokens;
}

// KV tokens that the span's token `i` sees.
__device__ __forceinline__ int visible(const Span& span, int i) {
  return max(0, span.kv_end + i + 1 - span.len);
}

// Keys of one KV head of one request, in the engine's pages; vectors 16-byte aligned.
struct PagedKeys {
  const char* base;
  const int32_t* pages;  // of the request
  int64_t page_bytes;
  int64_t token_bytes;
  int log2_page_tokens;

  __device__ PagedKeys(const Step& step, int req, int kv_head, int element_bytes = 2)
      : base(static_cast<const char*>(step.batch.k) +
             element_bytes * step.batch.k_head_stride * kv_head),
        pages(step.batch.block_table + step.batch.table_stride * req),
        page_bytes(element_bytes * step.batch.k_page_stride),
        token_bytes(element_bytes * step.batch.k_token_stride),
        log2_page_tokens(step.layout.log2_page_tokens) {}

  __device__ __forceinline__ const char* at(int token) const {
    const int64_t page = __ldg(pages + (token >> log2_page_tokens));
    return base + page * page_bytes + (token & ((1 << log2_page_tokens) - 1)) * token_bytes;
  }
};

// Four lanes copy one vector of a tile: 64 bytes of each line at a time, and a number of 16-byte
// units that divides by 4 whatever the head_dim.
constexpr int kLanesPerVector = 4;

// Starts the copy of this lane's quarter of one vector to row `row` of a tile; zeros where not
// `wanted`.
__device__ __forceinline__ void copy_vector(uint32_t tile, int row, const char* source, bool wanted,
                                            const Layout& layout) {
  const int unit = threadIdx.x % kLanesPerVector;
  const uint32_t to = tile + row * pitch_of(layout) + 16 * unit;
  for (int i = 0; i < layout.head_dim / 8; i += kLanesPerVector) {
    ptx::copy_async_alone(to + 16 * i, source + 16 * (unit + i), wanted);
  }
}

// The same of a vector of e4m3, which `widen_vector` makes wide once it is there; neither needs the
// head_dim to be a multiple of 64.
__device__ __forceinline__ void copy_stored_vector(uint32_t tile, int row, const char* source,
                                                   bool wanted, const Layout& layout) {
  const uint32_t to = tile + row * pitch_of(layout);
  for (int i = threadIdx.x % kLanesPerVector; i < layout.head_dim / 16; i += kLanesPerVector) {
    ptx::copy_async_alone(to + i * kCopyStep<E4m3>, source + 16 * i, wanted);
  }
}

// By the lanes that copied it.
template <class Element>
__device__ __forceinline__ void widen_vector(uint8_t* vector, const Layout& layout) {
  for (int i = threadIdx.x % kLanesPerVector; i < layout.head_dim / 16; i += kLanesPerVector) {
    widen_in_place<Element>(vector + i * kCopyStep<E4m3>);
  }
}

// As `multiply` over kDims dims, with every address but two known at compile time; vectors of `q`
// have kQueryDims, those of `k` no more than these.
template <class Element, int kTiles, int kDims, int kQueryDims = kDims>
__device__ __forceinline__ void multiply_dim(float (&sums)[2][kTiles][4], uint32_t q, uint32_t k) {
  constexpr uint32_t kPitch = row_bytes(kDims), kQueryPitch = row_bytes(kQueryDims);
  const int lane = threadIdx.x % 32;
  q += lane % 16 * kQueryPitch + lane / 16 * 16;
  k += (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
  for (uint32_t d = 0; d < 2 * kDims; d += 32) {
    uint32_t a[2][4];
    ptx::load_matrices(a[0], q + d);
    ptx::load_matrices(a[1], q + d + 16 * kQueryPitch);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      ptx::load_matrices(b, k + d + 8 * n * kPitch);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::mma<Element>(sums[m][n], a[m], b[0], b[1]);
        ptx::mma<Element>(sums[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Adds q k^T of 32 rows of `q` and 8 * kTiles rows of `k`, both tiles in shared memory, to `sums`:
// [m][n] are rows 16 m .. of q and 8 n .. of k, in the layout of the 16 x 8 product.
template <class Element, int kTiles>
__device__ __forceinline__ void multiply(float (&sums)[2][kTiles][4], uint32_t q, uint32_t k,
                                         const Layout& layout) {
  switch (layout.head_dim) {
    case 64:
      return multiply_dim<Element, kTiles, 64>(sums, q, k);
    case 96:
      return multiply_dim<Element, kTiles, 96>(sums, q, k);
    case 128:
      return multiply_dim<Element, kTiles, 128>(sums, q, k);
    default:
      return multiply_dim<Element, kTiles, 256>(sums, q, k);
  }
}

}  // namespace compactattn::select
