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
  using PassMeans = Means<kWide, kPass>;
  static constexpr int kVectorStep = kWide / kLanesPerVector, kVectors = kPass / kVectorStep;

  const Step& step;
  const Tile& tile;
  const Slice& slice;
  uint32_t keys;     // shared memory; where cells come later
  uint32_t queries;  // two tiles from here on
  int seen[4];
  Weight weights[4];

  __device__ __forceinline__ int log2_block() const { return step.layout.log2_block_tokens; }
  __device__ __forceinline__ uint32_t tile_bytes() const {
    return kMaxRows * pitch_of(step.layout);
  }

  // Vector `i` of those of a tile that this thread helps to copy.
  __device__ __forceinline__ int vector(int i) const {
    return static_cast<int>(threadIdx.x) / kLanesPerVector + i * kVectorStep;
  }

  __device__ __forceinline__ Pooling(const Step& step, const Tile& tile, const Slice& slice,
                                     uint32_t shared, uint32_t cells_bytes)
      : step(step), tile(tile), slice(slice), keys(shared), queries(shared + cells_bytes) {}

  // Where keys `token` .. of the rows' own blocks lie; those past the end, where the last one does.
  __device__ __forceinline__ void find_keys(int token, const char* (&found)[kVectors]) const {
    const PagedKeys paged(step, tile.span.req, tile.kv_head);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      found[i] = paged.at(min(token + vector(i), tile.kv_end - 1));
    }
  }

  __device__ __forceinline__ void copy_keys(int token, const char* const (&found)[kVectors]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      copy_vector(keys, vector(i), found[i], token + vector(i) < tile.kv_end, step.layout);
    }
  }

  // Starts the copy of keys `token` ..; all look-ups before the first copy.
  __device__ __forceinline__ void load_keys(int token) const {
    const char* found[kVectors];
    find_keys(token, found);
    copy_keys(token, found);
    ptx::commit_copies();
  }

  // The same of the sampled rows, zeros up to 128. Writes what each row sees.
  __device__ __forceinline__ void load_rows(int (&all_seen)[kMaxRows]) const {
    Row rows[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) rows[i] = row_at(step, tile, min(vector(i), tile.rows - 1));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool wanted = vector(i) < tile.rows;
      copy_vector(queries, vector(i), rows[i].query, wanted, step.layout);
      if (threadIdx.x % kLanesPerVector == 0) all_seen[vector(i)] = wanted ? rows[i].seen : 0;
    }
    ptx::commit_copies();
  }

  __device__ __forceinline__ PassMeans find_means(int at) const {
    return {step, tile, slice.first + at, slice.first + slice.count};
  }

  // Logits of columns `low` .. `high` of the pass, one each a row, times the scale and plus `more`;
  // -inf elsewhere. Adds their weights to the rows'.
  __device__ __forceinline__ void fold(Logits& logits, const int (&low)[4], const int (&high)[4],
                                       float more) {
    const float scale = step.layout.sm_scale * kLog2E;
    const int first = warp_column() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      Weight& weight = weights[r];
      const int from = low[r] - first, to = high[r] - first;
      float top = weight.max;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int column = n / 2 * 8 + n % 2;
        float& x = logits[r / 2][n / 2][r % 2 * 2 + n % 2];
        x = from <= column && column < to ? fmaf(x, scale, more) : -INFINITY;
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

  // Cells of blocks `at` .. of the slice, whole eights of them: a row's pitch has room.
  __device__ __forceinline__ void write_cells(const Logits& logits, int at) const {
    const int left = slice.count - at - warp_column();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = logit_row(r);
      if (row >= tile.rows) continue;
      float* cells = slice.cells + row * slice.pitch + at + warp_column() + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (8 * n >= left) continue;
        const float* pair = &logits[r / 2][n][r % 2 * 2];
        *reinterpret_cast<float2*>(cells + 8 * n) = float2{pair[0], pair[1]};
      }
    }
  }

  __device__ __forceinline__ void keep_cells() const {
    for (int row = threadIdx.x / 32; row < tile.rows; row += kWide / 32) {
      const int64_t to = static_cast<int64_t>(row) * step.layout.max_blocks + slice.first;
      for (int j = threadIdx.x % 32; j < slice.count; j += 32) {
        tile.cells[to + j] = slice.cells[row * slice.pitch + j];
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

  __device__ __forceinline__ int tails() const {
    int passes = 0;
    while (tail_token(passes) < tile.kv_end) ++passes;
    return passes;
  }

  // Loads keys `token` .. if a row ends there, else false; `low` and `high` of fold.
  __device__ __forceinline__ bool begin_tail(int p, int (&low)[4], int (&high)[4]) const {
    const int token = tail_token(p);
    if (p > 0) {
      if (!__syncthreads_or(ends_in(token))) return false;
      load_keys(token);
      ptx::wait_copies_but<0>();
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) low[r] = own_block(seen[r]) - token, high[r] = seen[r] - token;
    return __any_sync(0xffffffffu, ends_in(token));
  }

  // The same of means of blocks `at` .. of the slice.
  __device__ __forceinline__ bool begin_means(int at, char* shared_means, int (&low)[4],
                                              int (&high)[4]) const {
    __syncthreads();  // what the pass before read gives way
    if (at > 0) {
      find_means(at).template load<Element, 4>(shared_means);
      __syncthreads();
    }
    const int first = slice.first + at, left = slice.count - at;
#pragma unroll
    for (int r = 0; r < 4; ++r) low[r] = 0, high[r] = min(left, (seen[r] >> log2_block()) - first);
    return warp_row() < tile.rows && warp_column() < left;
  }

  // Keys first, then means, by the same code: a launch meets it cold. Those of the first passes are
  // loaded before the samples are known.
  __device__ __forceinline__ void run(char* shared_means) {
    __shared__ int all_seen[kMaxRows];
    const PassMeans means = find_means(0);
    if (tail_token(0) < tile.kv_end) load_keys(tail_token(0));
    if (slice.count > 0) means.template load<Element, 4>(shared_means);
    ptx::wait_for_earlier();  // whose samples these are
    load_rows(all_seen);
    ptx::wait_copies_but<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      seen[r] = all_seen[logit_row(r)];
      weights[r].clear();
    }
    const uint32_t pitch = pitch_of(step.layout), rows = queries + warp_row() * pitch;
    const int tails = this->tails(), passes = (slice.count + kPass - 1) / kPass;
#pragma unroll 1
    for (int p = 0; p < tails + passes; ++p) {
      const bool pools = p >= tails;
      const int at = (p - tails) * kPass;
      int low[4], high[4];
      if (!(pools ? begin_means(at, shared_means, low, high) : begin_tail(p, low, high))) continue;
      Logits logits = {};
      const uint32_t columns = pools ? queries + tile_bytes() : keys;
      compactattn::select::multiply<Element, 8>(logits, rows, columns + warp_column() * pitch,
                                                step.layout);
      fold(logits, low, high, pools ? log2_block() : 0.0f);
      if (pools) write_cells(logits, at);
    }
    if (!slice.is_kept) return;
    __syncthreads();
    keep_cells();
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
  if (!knows_spans(step)) ptx::wait_for_earlier();
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
  compactattn::select::pooled_lists<__nv_bfloat16>(step, wish, shared_bytes);
}

extern "C" __global__ void COMPACTATTN_SCORING_CLUSTER __launch_bounds__(256, 1)
    compactattn_pooled_lists_fp16(const __grid_constant__ compactattn::Step step,
                                  const __grid_constant__ compactattn::select::Wish wish) {
  compactattn::select::pooled_lists<__half>(step, wish, shared_bytes);
}
