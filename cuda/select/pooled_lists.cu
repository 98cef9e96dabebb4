// select by mean keys, and union and table after it, in one launch: what cells_pool, cells_mass and
// union_table do where a span has one tile of sampled rows (rust/select/pooled_mass.rs).
//
// Dynamic shared memory: cells, 128 rows of `pitch` floats but at least a tile of 128 keys
// (row_bytes each), then two tiles of 128 rows: queries and means.
#include "cluster.cuh"
#include "means.cuh"

namespace compactattn::select {
namespace {

constexpr int kPass = 128;  // blocks, or keys, that meet the rows at once

using Logits = float[2][8][4];

// Rows and columns of the pass that a thread's logits belong to: a warp has 32 rows, 64 columns.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 4 * 32; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 128 * 64; }
__device__ __forceinline__ int logit_row(int r) {
  return warp_row() + r / 2 * 16 + r % 2 * 8 + threadIdx.x % 32 / 4;
}

template <class Element>
struct Pooling {
  const Step& step;
  const Tile& tile;
  const Slice& slice;
  uint32_t keys;     // shared memory; where cells come later
  uint32_t queries;  // two tiles from here on
  int seen[4];
  Weight weights[4];

  __device__ __forceinline__ int log2_block() const { return step.layout.log2_block_tokens; }
  __device__ __forceinline__ float scale() const { return step.layout.sm_scale * kLog2E; }
  __device__ __forceinline__ uint32_t tile_bytes() const {
    return kMaxRows * pitch_of(step.layout);
  }

  __device__ __forceinline__ Pooling(const Step& step, const Tile& tile, const Slice& slice,
                                     uint32_t shared, uint32_t cells_bytes)
      : step(step), tile(tile), slice(slice), keys(shared), queries(shared + cells_bytes) {}

  // Starts the copy of the sampled rows, zeros up to 128.
  __device__ __forceinline__ void load_queries() const {
#pragma unroll
    for (int i = threadIdx.x / kLanesPerVector; i < kMaxRows; i += kWide / kLanesPerVector) {
      const Row row = row_at(step, tile, i);
      const char* query = row.query ? row.query : static_cast<const char*>(step.batch.q);
      copy_vector(queries, i, query, row.query != nullptr, step.layout);
    }
  }

  // Starts the copy of keys `token` .. of the rows' own blocks.
  __device__ __forceinline__ void load_keys(uint32_t to, int token) const {
    const PagedKeys paged(step, tile.span.req, tile.kv_head);
#pragma unroll
    for (int i = threadIdx.x / kLanesPerVector; i < kPass; i += kWide / kLanesPerVector) {
      const bool wanted = token + i < tile.kv_end;
      copy_vector(to, i, wanted ? paged.at(token + i) : paged.base, wanted, step.layout);
    }
  }

  // Adds the logits' weights to the rows'; `cell(r, column, logit)` is the logit's, -inf for none.
  template <class Cell>
  __device__ __forceinline__ void fold(Logits& logits, Cell cell) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Weight& weight = weights[r];
      float top = weight.max;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        float& x = logits[r / 2][n / 2][r % 2 * 2 + n % 2];
        x = cell(r, warp_column() + n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2, x);
        top = fmaxf(top, x);
      }
      weight.sum *= ptx::exp2_approx(weight.max - top);
      weight.max = top;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        weight.sum += ptx::exp2_approx(logits[r / 2][n / 2][r % 2 * 2 + n % 2] - top);
      }
    }
  }

  // First token of the block that a row sees in part.
  __device__ __forceinline__ int own_block(int seen) const {
    return seen >> log2_block() << log2_block();
  }

  // Whether one of the thread's rows ends among the pass's keys, `token` ..
  __device__ __forceinline__ bool ends_in(int token) const {
    bool ends = false;
#pragma unroll
    for (int r = 0; r < 4; ++r) ends |= own_block(seen[r]) < token + kPass && token < seen[r];
    return ends;
  }

  // Rows with the keys at `from` of the one block that each sees in part, `token` ..
  __device__ __forceinline__ void add_keys(uint32_t from, int token) {
    if (!__any_sync(0xffffffffu, ends_in(token))) return;
    Logits logits = {};
    const uint32_t pitch = pitch_of(step.layout);
    compactattn::select::multiply<Element, 8>(logits, queries + warp_row() * pitch,
                                              from + warp_column() * pitch, step.layout);
    fold(logits, [&](int r, int column, float x) {
      const int at = token + column;
      return own_block(seen[r]) <= at && at < seen[r] ? x * scale() : -INFINITY;
    });
  }

  // Means of blocks `at` .. of the slice.
  __device__ __forceinline__ void load_pass(int at, char* to) const {
    const int end = slice.first + slice.count;
    load_means<Element, kWide, kPass>(step, tile, slice.first + at, end, to);
  }

  // Products of the rows with the means of the pass.
  __device__ __forceinline__ void multiply_means(Logits& logits) const {
    const uint32_t pitch = pitch_of(step.layout), rows = queries + warp_row() * pitch;
    const uint32_t means = queries + tile_bytes() + warp_column() * pitch;
    compactattn::select::multiply<Element, 8>(logits, rows, means, step.layout);
  }

  // Cells of blocks `at` .. of the slice.
  __device__ __forceinline__ void add_means(Logits& logits, int at) {
    const int first = slice.first + at, left = slice.count - at;
    fold(logits, [&](int r, int column, float x) {
      const bool is_whole = column < left && first + column < seen[r] >> log2_block();
      return is_whole ? fmaf(x, scale(), log2_block()) : -INFINITY;
    });
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t row = logit_row(r);
      float* cells = slice.cells + row * slice.pitch + at;
      if (row >= tile.rows) continue;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int column = warp_column() + n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2;
        if (column >= left) continue;
        const float cell = logits[r / 2][n / 2][r % 2 * 2 + n % 2];
        cells[column] = cell;
        if (slice.is_kept) tile.cells[row * step.layout.max_blocks + first + column] = cell;
      }
    }
  }

  // Blocks of which rows see a part, in units of whole blocks and whole passes, dealt to the CTAs.
  __device__ __forceinline__ int log2_unit() const { return max(7, log2_block()); }

  // First token of this CTA's pass `p` over them; past the end if there is none.
  __device__ __forceinline__ int tail_token(int p) const {
    const int log2_passes = log2_unit() - 7, passes = 1 << log2_passes;
    const int unit =
        (tile.least_visible >> log2_unit()) + cluster_rank() + (p >> log2_passes) * kCtas;
    return min((unit << log2_unit()) + (p & (passes - 1)) * kPass, tile.kv_end);
  }

  __device__ __forceinline__ void run(char* shared_means) {
    const int first_tail = tail_token(0);
    load_queries();
    if (first_tail < tile.kv_end) load_keys(keys, first_tail);
    ptx::commit_copies();
    if (slice.count > 0) load_pass(0, shared_means);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      seen[r] = row_at(step, tile, logit_row(r)).seen;
      weights[r].clear();
    }
    ptx::wait_copies_but<0>();
    __syncthreads();
    if (first_tail < tile.kv_end) add_keys(keys, first_tail);
    __syncthreads();  // cells take the place of these keys
    for (int at = 0; at < slice.count; at += kPass) {
      if (at > 0) {
        load_pass(at, shared_means);
        __syncthreads();
      }
      if (warp_row() < tile.rows && at + warp_column() < slice.count) {
        Logits logits = {};
        multiply_means(logits);
        add_means(logits, at);
      }
      __syncthreads();
    }
    for (int p = 1, token; (token = tail_token(p)) < tile.kv_end; ++p) {
      if (!__syncthreads_or(ends_in(token))) continue;
      load_keys(queries + tile_bytes(), token);
      ptx::commit_copies();
      ptx::wait_copies_but<0>();
      __syncthreads();
      add_keys(queries + tile_bytes(), token);
    }
  }

  // The weights of all rows, by halves of the columns.
  __device__ __forceinline__ void write(Exchange& exchange) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float top = quad_max(weights[r].max);
      const float sum = quad_sum(weights[r].sum * ptx::exp2_approx(weights[r].max - top));
      if (threadIdx.x % 4 == 0) exchange.parts[threadIdx.x / 128][logit_row(r)] = {top, sum};
    }
  }
};

template <class Element>
__device__ __forceinline__ void pooled_lists(const Step& step, const Wish& wish, char* shared) {
  const uint32_t cells_bytes = pooled_cells_bytes(step.layout.head_dim, wish.pitch);
  const uint32_t means = cells_bytes + kMaxRows * pitch_of(step.layout);
  score(step, wish, shared, [&](const Tile& tile, const Slice& slice, Exchange& exchange) {
    Pooling<Element> pooling(step, tile, slice, shared_address(shared), cells_bytes);
    pooling.run(shared + means);
    pooling.write(exchange);
  });
}

}  // namespace
}  // namespace compactattn::select

extern __shared__ __align__(16) char shared_bytes[];

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(256, 1)
    compactattn_pooled_lists_bf16(const __grid_constant__ compactattn::Step step,
                                  const __grid_constant__ compactattn::select::Wish wish) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::pooled_lists<__nv_bfloat16>(step, wish, shared_bytes);
}

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(256, 1)
    compactattn_pooled_lists_fp16(const __grid_constant__ compactattn::Step step,
                                  const __grid_constant__ compactattn::select::Wish wish) {
  compactattn::ptx::wait_for_earlier();
  compactattn::select::pooled_lists<__half>(step, wish, shared_bytes);
}
