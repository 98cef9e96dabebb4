// select on sm_90a: cells by the blocks' keys, exact (rust/select/cells.rs, Cells::read), as
// cells_read.cu has them.
//
// Grid (any > 0) x KeyTile::kThreads: the CTAs share all blocks evenly, one an SM fills a GPU. One
// warp copies boxes of keys from the paged pool into a ring of tiles; consumer warpgroups multiply
// them with 64 sampled rows each, of one select span or of two, and fold the products to one number
// a (row, block).
#pragma once

#include "../../ptx/grid.cuh"
#include "../../ptx/wgmma.cuh"
#include "share.cuh"

namespace compactattn::select::sm90 {

// ---- producer ----

// The one box of each key tile that a lane copies: of min(page, block, kTokens) tokens or half of
// them, and 64 columns. Nothing of it stays in registers, which the warp has few of.
template <class T>
struct BoxLane {
  const Layout& layout;

  static_assert(T::kTokens / 16 * T::kGroups <= 32, "boxes of 16 tokens, one a lane");

  __device__ __forceinline__ int lane() const {
    return static_cast<int>(ptx::not_before(threadIdx.x)) % 32;
  }

  // Token of the tile.
  __device__ __forceinline__ int first() const {
    const int log2_box = min(layout.log2_page_tokens, layout.log2_block_tokens);
    const int rows = ptx::copied_tokens(min(1 << log2_box, T::kTokens));
    return lane() / T::kGroups * rows;
  }

  // Group of 64.
  __device__ __forceinline__ int columns() const { return lane() % T::kGroups; }

  // Byte of the tile.
  __device__ __forceinline__ int smem() const {
    return columns() * T::kKeyGroupBytes + first() * T::kRowBytes;
  }

  __device__ __forceinline__ bool copies() const { return first() < T::kTokens; }
};

// Where token `i` of the unit's blocks lies in the pool; in the page past the last, which reads as
// zeros, if no row sees it.
template <bool kListed>
__device__ __forceinline__ ptx::PoolBox place(const Step& step, const Segment<kListed>& segment,
                                              int i) {
  const Layout& layout = step.layout;
  ptx::PoolBox at{0, 0, segment.tile.kv_head, step.batch.num_pages};
  const int index = i >> layout.log2_block_tokens;
  if (index >= segment.blocks.count) return at;
  const int within = i & ((1 << layout.log2_block_tokens) - 1);
  const int token = (segment.blocks.at(index) << layout.log2_block_tokens) + within;
  if (token >= segment.tile.kv_end) return at;
  at.token = token & ((1 << layout.log2_page_tokens) - 1);
  at.page = __ldg(step.batch.block_table + step.batch.table_stride * segment.tile.span.req +
                  (token >> layout.log2_page_tokens));
  return at;
}

// The tiles of an order, one after the other; by one warp. A tile that is taken from those of all
// was asked for while the one before it was copied. The order is in shared memory: registers are
// short.
template <bool kListed>
class Tiles {
 public:
  __device__ __forceinline__ Tiles(const Step& step, const Order& order)
      : step(step), order(order), tile(order.begin - order.step) {
    if (!kListed && order.pool_end > 0) take();
  }

  // None: < 0.
  __device__ __forceinline__ int next() {
    if (tile + order.step < order.end) return tile += order.step;
    if (kListed || order.pool_end == 0) return -1;
    const int asked_for = __shfl_sync(0xffffffffu, asked, 0) + order.end;
    if (asked_for >= order.pool_end) return -1;
    take();
    return asked_for;
  }

 private:
  const Step& step;
  const Order& order;
  int tile;   // the last that no other CTA could take
  int asked;  // lane 0's

  __device__ __forceinline__ void take() {
    if (threadIdx.x % 32 == 0) asked = atomicAdd(step.stages.arrivals + order.kv_head, 1);
  }
};

// One warp.
template <class T, bool kListed>
struct Producer {
  const CUtensorMap& map;
  const Step& step;
  SharedStorage<T>& smem;
  BoxLane<T> mine;
  ptx::Ring<T::kStages> ring;

  __device__ __forceinline__ Producer(const CUtensorMap& map, const Step& step,
                                      SharedStorage<T>& smem)
      : map(map), step(step), smem(smem), mine{step.layout}, ring{} {}

  // Copies the keys of a segment. Every tile arrives with all its bytes, zeros included.
  __device__ __forceinline__ void run(const Segment<kListed>& segment) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) smem.order = segment.order();
    __syncwarp();
    Tiles<kListed> tiles(step, smem.order);
    int tile = tiles.next();
    ptx::PoolBox next = place(step, segment, tile * T::kTokens + mine.first());
#pragma unroll 1
    while (tile >= 0) {
      const ptx::PoolBox at = next;
      const int now = tile;
      // A tile's table entry is under way while the tile before it waits for room.
      tile = tiles.next();
      if (tile >= 0) next = place(step, segment, tile * T::kTokens + mine.first());
      copy(at, now);
    }
    if constexpr (!kListed) {
#pragma unroll 1
      for (int team = 0; smem.order.pool_end > 0 && team < T::kTeams; ++team) copy_none();
    }
  }

  __device__ __forceinline__ void copy(ptx::PoolBox at, int tile) {
    ptx::CopyBarrier& full = smem.full[ring.stage];
    smem.empty[ring.stage].wait(ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      smem.tiles[ring.stage] = tile;
      full.arrive_and_expect_tx(T::kKeyBytes);
    }
    __syncwarp();
    if (mine.copies()) {
      at.columns = mine.columns();
      ptx::load(map, full, smem.keys[ring.stage] + mine.smem(), at, ptx::CacheHint::EVICT_FIRST);
    }
    ring.advance();
  }

  // Tells a team that no tile comes any more.
  __device__ __forceinline__ void copy_none() {
    smem.empty[ring.stage].wait(ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      smem.tiles[ring.stage] = -1;
      smem.full[ring.stage].arrive();
    }
    __syncwarp();
    ring.advance();
  }
};

// ---- consumers ----

// Finished cells of a thread's two rows, until each lane of a quad holds one of each: four
// neighbours of a row are stored at once, a quarter of the writes to memory.
struct Held {
  float cells[2];
  int block;  // none: < 0
  int count;
};

// Weight of some keys: sum * 2^max, `max` of the quad's lanes together. It starts at the lowest
// finite number: a row that sees nothing gets a sum of 0.
struct Partial {
  float max[2];
  float sum[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) max[r] = -FLT_MAX, sum[r] = 0.0f;
  }
};

// Named barriers: one a part of the rows, and one a part of the consumers, up to four each.
constexpr int kMeet = 0;
constexpr int kTurn = 4;

template <class T, bool kListed>
struct Consumer {
  using Logits = float[T::kLogits];
  using Keys = Segment<kListed>;

  const Step& step;
  SharedStorage<T>& smem;
  int part;  // a warpgroup
  int lane;
  ptx::Ring<T::kStages> ring;
  int seen[2];
  float* cells;  // of the thread's first row; its second is 8 below
  Held held;
  Partial partial;

  __device__ __forceinline__ Consumer(const Step& step, SharedStorage<T>& smem)
      : step(step), smem(smem), ring{} {
    lane = threadIdx.x % 32;
    // The compiler learns that operands made of it are the same in all lanes.
    part = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  }

  __device__ __forceinline__ int log2_block() const { return step.layout.log2_block_tokens; }

  // Of the rows of all spans, and of those of its span.
  __device__ __forceinline__ int row_part() const { return part % T::kRowParts; }
  __device__ __forceinline__ int half() const { return part % 2; }

  __device__ __forceinline__ int team() const { return part / T::kRowParts; }

  // All warps of this part of the rows meet.
  __device__ __forceinline__ void meet() const {
    cutlass::arch::NamedBarrier::sync(128 * T::kTeams, kMeet + row_part());
  }

  // The tensor cores are one part's at a time, so that its products run beside the exponentials of
  // the others: by itself each waits for the same keys and all do the same at once.
  __device__ __forceinline__ void take_turn() const {
    cutlass::arch::NamedBarrier::sync(256, kTurn + part);
  }

  __device__ __forceinline__ void pass_turn() const {
    cutlass::arch::NamedBarrier::arrive(256, kTurn + ((part + 1) & (players() - 1)));
  }

  // Warpgroups that take tiles, a power of two. A block of several tiles is one team's, and then
  // all are the first one's: a stage of the ring may not be another's each time around.
  __device__ __forceinline__ int players() const {
    return 1 << log2_block() > T::kTokens ? T::kRowParts : T::kParts;
  }

  __device__ __forceinline__ bool takes_stage() const {
    if (T::kTeams == 1) return true;
    return players() == T::kParts ? ring.stage % T::kTeams == team() : team() == 0;
  }

  // This part of the rows to shared memory, swizzled as the products want them; zeros past the
  // tile's.
  __device__ __forceinline__ void load_queries(const Tile& tile) {
    constexpr int kLoads = 64 * kUnits / kLoaders, kAtOnce = kLoads < 4 ? kLoads : 4;
    const int thread = ptx::not_before(threadIdx.x) % 128, first = row_part() * 64;
    const int warp_row = thread / 32 * 16;
    meet();  // done with the rows before
    const Row mine = row_at(step, tile, half() * 64 + warp_row + lane % 16);
    if (lane < 16) smem.row_queries[first + warp_row + lane] = mine.query;
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = __shfl_sync(0xffffffffu, mine.seen, lane / 4 + 8 * r);
    meet();
#pragma unroll 1
    for (int i = 0; i < kLoads; i += kAtOnce)
      copy_queries<kAtOnce>(first, thread + team() * 128 + i * kLoaders);
    cutlass::arch::fence_view_async_shared();
    meet();
  }

  static constexpr int kUnits = T::kHeadDim / 8;  // of 16 bytes, of a row
  static constexpr int kLoaders = 128 * T::kTeams;

  // Every kLoaders'th of kLoads units of the rows from `first` on, from unit `at` on.
  template <int kLoads>
  __device__ __forceinline__ void copy_queries(int first, int at) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int unit = at + i * kLoaders;
      const char* query = smem.row_queries[first + unit / kUnits];
      loaded[i] = query ? __ldg(reinterpret_cast<const uint4*>(query) + unit % kUnits) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int to = first + (at + i * kLoaders) / kUnits, unit = (at + i * kLoaders) % kUnits;
      uint8_t* group = smem.queries + unit / 8 * T::kQueryGroupBytes + to * T::kRowBytes;
      reinterpret_cast<uint4*>(group)[unit % 8 ^ to % 8] = loaded[i];
    }
  }

  __device__ __forceinline__ void multiply(Logits& logits) {
    using Element = typename T::Element;
    const uint64_t left = ptx::swizzled_operand(smem.queries + row_part() * 64 * T::kRowBytes);
    const uint64_t right = ptx::swizzled_operand(smem.keys[ring.stage]);
    ptx::fence_registers(logits);
    cute::warpgroup_arrive();
#pragma unroll
    for (int d = 0; d < T::kHeadDim / 16; ++d) {
      const ptx::ScaleOut keep = d == 0 ? ptx::ScaleOut::Zero : ptx::ScaleOut::One;
      const uint64_t a = ptx::advanced(left, d / 4 * T::kQueryGroupBytes + d % 4 * 32);
      const uint64_t b = ptx::advanced(right, d / 4 * T::kKeyGroupBytes + d % 4 * 32);
      ptx::mma<Element, ptx::Major::K>(logits, a, b, keep);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    ptx::fence_registers(logits);
  }

  // Fills the cells of a segment.
  __device__ __forceinline__ void run(const Keys& keys) {
    switch (log2_block()) {
      case 4:
        return run_tiles<16>(keys);
      case 5:
        return run_tiles<32>(keys);
      case 6:
        return run_tiles<64>(keys);
      default:
        return run_tiles<T::kTokens>(keys);
    }
  }

  // The same where a tile has blocks of `kColumns` tokens, or a part of one that is no smaller.
  template <int kColumns>
  __device__ __forceinline__ void run_tiles(const Keys& keys) {
    const bool works = half() * 64 < keys.tile.rows;
    if (works) load_queries(keys.tile);
    const int64_t row = half() * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
    cells = cells_of(step, keys.tile.select_span, keys.tile.kv_head) + row * step.layout.max_blocks;
    held = {};
    partial.clear();
#pragma unroll 1
    for (int t = keys.begin; keys.is_pooled() || t < keys.end; ++t, ring.advance()) {
      if (!takes_stage()) continue;
      const int block = block_of_lane(keys, t);
      Logits logits;
      smem.full[ring.stage].wait(ring.phase);
      if (keys.is_pooled()) {
        t = smem.tiles[ring.stage];
        // The assembler takes votes as the same in all lanes, and wants to know that turns are.
        if (__any_sync(0xffffffffu, t < 0)) break;
      }
      take_turn();
      if (works) multiply(logits);
      pass_turn();
      if (lane == 0) smem.empty[ring.stage].arrive();
      if (!works) continue;
      if constexpr (kColumns < T::kTokens) fold_blocks<kColumns>(keys, t, block, logits);
      if constexpr (kColumns >= T::kTokens) fold(keys, t, block, logits);
    }
    if (works) write();
  }

  // Lane i of eight knows the tile's block i.
  __device__ __forceinline__ int block_of_lane(const Keys& keys, int t) const {
    const int i = (t * T::kTokens >> log2_block()) + lane % 8;
    return keys.blocks.at(min(i, keys.blocks.count - 1));
  }

  // A tile of a block: adds its products, and keeps the cell where the block ends.
  __device__ __forceinline__ void fold(const Keys& keys, int t, int block, Logits& logits) {
    const int mask = (1 << log2_block()) - 1, i = t * T::kTokens;
    if (i >> log2_block() >= keys.blocks.count) return;
    const int at = kListed ? __shfl_sync(0xffffffffu, block, 0) : i >> log2_block();
    const int token = (at << log2_block()) + (i & mask);
    if (token + T::kTokens > keys.tile.least_visible) hide<T::kTokens>(logits, 0, token);
    add(logits);
    if ((i + T::kTokens & mask) == 0) finish(at);
  }

  // A tile of several blocks. Lane i of a quad gets the cell of every fourth block from i on.
  template <int kColumns>
  __device__ __forceinline__ void fold_blocks(const Keys& keys, int t, int block, Logits& logits) {
    constexpr int kBlocks = T::kTokens / kColumns, kAtOnce = kBlocks < 4 ? kBlocks : 4;
    const int count = keys.blocks.count - t * kBlocks;
    // Blocks that are no list lie side by side: one question for all of them.
    if (kListed || (t + 1) * T::kTokens > keys.tile.least_visible) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int at = kListed ? __shfl_sync(0xffffffffu, block, i) : t * kBlocks + i;
        const bool all = i < count && (at + 1) * kColumns <= keys.tile.least_visible;
        if (!all) hide<kColumns>(logits, i * kColumns, i < count ? at * kColumns : INT_MAX / 2);
      }
    }
#pragma unroll
    for (int first = 0; first < kBlocks; first += kAtOnce) {
      const int i = first + lane % kAtOnce;
      const int at = kListed ? __shfl_sync(0xffffffffu, block, i) : t * kBlocks + i;
      const bool mine = kAtOnce == 4 || lane % 4 / kAtOnce == held.count / kAtOnce;
      float cells[2];
      const bool far = !near_cells<kColumns, kAtOnce>(logits, first, cells);
      if (__any_sync(0xffffffffu, far)) far_cells<kColumns, kAtOnce>(logits, first, cells);
      if (mine)
        held.block = i < count ? at : -1, held.cells[0] = cells[0], held.cells[1] = cells[1];
      held.count += kAtOnce;
      if (held.count == 4) write();
    }
  }

  __device__ __forceinline__ static bool is_near(float cell) { return fabsf(cell) < 60.0f; }

  // Cells of the lane's block of kAtOnce from block `first` on, by weights as they are, over 2^0;
  // false where one is so far from there that floats may not have held them. Which, the block's own
  // logits decide: no other order of tiles has other cells.
  template <int kColumns, int kAtOnce>
  __device__ __forceinline__ bool near_cells(const Logits& logits, int first,
                                             float (&cells)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sums[kAtOnce];
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b)
        sums[b] = sum_of<kColumns>(logits, (first + b) * kColumns, r, 0.0f);
      cells[r] = ptx::log2_approx(own_sum(sums));
    }
    return is_near(cells[0]) && is_near(cells[1]);
  }

  // The far ones over the largest of their rows in the tile: what it takes below the smallest
  // number is no share of its row either.
  template <int kColumns, int kAtOnce>
  __device__ __forceinline__ void far_cells(const Logits& logits, int first,
                                            float (&cells)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = top_of(logits, r);
      float sums[kAtOnce];
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b)
        sums[b] = sum_of<kColumns>(logits, (first + b) * kColumns, r, top);
      const float cell = top + ptx::log2_approx(own_sum(sums));
      if (!is_near(cells[r])) cells[r] = cell;
    }
  }

  // The largest exponent of 2 in row `r` of the tile, of a quad's lanes together; a finite number.
  __device__ __forceinline__ float top_of(const Logits& logits, int r) const {
    float high[2] = {logits[2 * r], logits[2 * r + 1]};
#pragma unroll
    for (int n = 1; n < T::kTokens / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) high[e] = fmaxf(high[e], logits[4 * n + 2 * r + e]);
    }
    return fmaxf(-FLT_MAX, quad_max(fmaxf(high[0], high[1])) * step.layout.sm_scale * kLog2E);
  }

  __device__ __forceinline__ static float weight_of(float logit, float scale, float top) {
    return ptx::exp2_approx(fmaf(logit, scale, -top));
  }

  // A lane's part of row `r`'s weight of kColumns tokens from column `from` on, over 2^top.
  template <int kColumns>
  __device__ __forceinline__ float sum_of(const Logits& logits, int from, int r, float top) const {
    const float scale = step.layout.sm_scale * kLog2E;
    // Two sums: half the length of the chain of additions.
    float even = weight_of(logits[from / 2 + 2 * r], scale, top);
    float odd = weight_of(logits[from / 2 + 2 * r + 1], scale, top);
#pragma unroll
    for (int n = 1; n < kColumns / 8; ++n) {
      even += weight_of(logits[from / 2 + 4 * n + 2 * r], scale, top);
      odd += weight_of(logits[from / 2 + 4 * n + 2 * r + 1], scale, top);
    }
    return even + odd;
  }

  // Each lane's parts of two or four sums to whole ones: lane i of a quad gets sum i (of two: i %
  // 2) by three exchanges (two) where one after the other would take eight (four).
  template <int kSums>
  __device__ __forceinline__ float own_sum(const float (&sums)[kSums]) const {
    static_assert(kSums == 2 || kSums == 4);
    const bool odd = lane & 1, high = lane & 2;
    float pair[kSums / 2];
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const float other = __shfl_xor_sync(0xffffffffu, odd ? sums[i] : sums[i + 1], 1);
      pair[i / 2] = (odd ? sums[i + 1] : sums[i]) + other;
    }
    if constexpr (kSums == 2) return pair[0] + __shfl_xor_sync(0xffffffffu, pair[0], 2);
    if constexpr (kSums == 4) {
      const float other = __shfl_xor_sync(0xffffffffu, high ? pair[0] : pair[1], 2);
      return (high ? pair[1] : pair[0]) + other;
    }
  }

  // Tokens from `token` on that a row does not see weigh nothing, whatever is stored there.
  template <int kColumns>
  __device__ __forceinline__ void hide(Logits& logits, int from, int token) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int left = seen[e / 2] - token - lane % 4 * 2 - e % 2;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        if (8 * n >= left) logits[from / 2 + 4 * n + e] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void add(const Logits& logits) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = fmaxf(partial.max[r], top_of(logits, r));
      const float before = partial.sum[r] * ptx::exp2_approx(partial.max[r] - top);
      partial.max[r] = top;
      partial.sum[r] = before + sum_of<T::kTokens>(logits, 0, r, top);
    }
  }

  __device__ __forceinline__ void finish(int block) {
    const bool mine = lane % 4 == held.count;
    if (mine) held.block = block;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(partial.sum[r]);
      if (mine) held.cells[r] = partial.max[r] + ptx::log2_approx(sum);
    }
    partial.clear();
    if (++held.count == 4) write();
  }

  __device__ __forceinline__ void write() {
    if (lane % 4 < held.count && held.block >= 0) {
      const int64_t second = 8 * static_cast<int64_t>(step.layout.max_blocks);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Rows past the tile's see nothing, others at least the past.
        if (seen[r] > 0) cells[r * second + held.block] = held.cells[r];
      }
    }
    held.count = 0;
  }
};

// ---- roles ----

template <class T, bool kListed>
__device__ __forceinline__ void read_cells(const CUtensorMap& map, const Step& step, int index) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  SharedStorage<T>& smem = *reinterpret_cast<SharedStorage<T>*>(bytes);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
    for (int i = 0; i < T::kStages; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(T::kConsumerWarps / T::kTeams);
    }
    cutlass::arch::fence_barrier_init();
  }
  // Keys are on their way before it is known which rows meet them: as many as there is room for. To
  // ask the cache for more keeps all that memory is asked for meanwhile waiting, rows too.
  const bool starts_early = !kListed && knows_spans(step);
  if (!starts_early) ptx::wait_for_earlier();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const bool consumes = warp < T::kConsumerWarps;
  const Units<T, kListed> units{step, index, T::kSpans > 1 && consumes ? warp / 8 : kLast};
  Share& left = smem.left[warp];
  const Share share = units.share(smem);
  if (threadIdx.x % 32 == 0) left = share;
  __syncwarp();
  Segment<kListed> segment;
  if (consumes) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    if (starts_early) ptx::wait_for_earlier();
    Consumer<T, kListed> consumer(step, smem);
    if (consumer.part == consumer.players() - 1) consumer.pass_turn();
    while (units.next(left, segment)) consumer.run(segment);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
    if (warp > T::kConsumerWarps) return;
    Producer<T, kListed> producer(map, step, smem);
    while (units.next(left, segment)) producer.run(segment);
  }
}

}  // namespace compactattn::select::sm90
