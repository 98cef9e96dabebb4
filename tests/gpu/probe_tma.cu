// How fast one SM's copy engine takes boxes of 16..128 tokens: a ring of 32 KB tiles, read by
// nobody.
#include "../../cuda/ptx/tma.cuh"

namespace {
using namespace compactattn::ptx;

constexpr int kStages = 6;
constexpr int kTileBytes = 32768;
constexpr int kTokens = 128;

struct Shared {
  alignas(1024) uint8_t tiles[kStages][kTileBytes];
  CopyBarrier full[kStages];
  Barrier empty[kStages];
};
}  // namespace

struct ProbeParams {
  const int32_t* pages;  // [streams, tiles, 128 / rows]
  long long* clocks;     // [CTAs]
  int32_t tiles;
  int32_t rows;     // of a box
  int32_t issuers;  // warps, 1 or 2
  int32_t streams;  // CTA c reads stream c % streams, KV head stream % heads
  int32_t heads;
  int32_t reserved;
};

extern "C" __global__ void __launch_bounds__(128, 1)
    probe_tma(const __grid_constant__ CUtensorMap map, const __grid_constant__ ProbeParams p) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  Shared& smem = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      smem.full[i].init(p.issuers);
      smem.empty[i].init(1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int boxes = kTokens / p.rows;
  const int stream = blockIdx.x % p.streams;
  const int32_t* pages = p.pages + static_cast<int64_t>(stream) * p.tiles * boxes;
  Ring<kStages> ring;
  if (warp < p.issuers) {
    const int box = p.issuers == 2 ? lane : lane / 2;
    const int columns = p.issuers == 2 ? warp : lane % 2;
    const bool copies = box < boxes;
    int page = copies ? pages[box] : 0;
    for (int t = 0; t < p.tiles; ++t) {
      const int next = copies && t + 1 < p.tiles ? pages[(t + 1) * boxes + box] : 0;
      smem.empty[ring.stage].wait(ring.phase ^ 1);
      if (lane == 0) smem.full[ring.stage].arrive_and_expect_tx(kTileBytes / p.issuers);
      __syncwarp();
      if (copies) {
        uint8_t* to = smem.tiles[ring.stage] + columns * (kTileBytes / 2) + box * p.rows * 128;
        load(map, smem.full[ring.stage], to, PoolBox{0, columns, stream % p.heads, page});
      }
      page = next;
      ring.advance();
    }
  } else if (threadIdx.x == 64) {
    const long long start = clock64();
    for (int t = 0; t < p.tiles; ++t) {
      smem.full[ring.stage].wait(ring.phase);
      smem.empty[ring.stage].arrive();
      ring.advance();
    }
    p.clocks[blockIdx.x] = clock64() - start;
  }
}
