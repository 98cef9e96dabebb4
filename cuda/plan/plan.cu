// plan: cuts the items of a launch into one share of equal cost for each CTA of attend.
//
// One CTA; the cuts depend on the lengths of the lists alone. Contiguous shares in item order, at
// most one cut in each (stream-K, arXiv 2301.03598, with costs in place of counts).
#include "../common/work.cuh"

namespace compactattn {
namespace {

constexpr int kThreads = 1024;
// In half tiles: a tile is 2, what an item costs beside its tiles 3 (prologue and epilogue,
// about 2.5 us of 1.7 a tile).
constexpr int kTileCost = 2;
constexpr int kItemCost = 3;
constexpr int kFewestTiles = 4;  // of a piece: fewer are not worth a partial result
// Of a share; it also keeps two cuts of one item apart.
constexpr int kLeastCost = kItemCost + kTileCost * kFewestTiles;

__device__ int cost_of(const Work& work, int i) {
  return kItemCost + kTileCost * stream_of(work, work.items[i]).tiles;
}

// Exclusive sum over the CTA's threads; the total in `total`.
__device__ int exclusive_sum(int x, int& total) {
  __shared__ int warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += below;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return before + sum - x;
}

// costs[i] = cost of the items before i; the total.
__device__ int sum_costs(const Work& work) {
  const int each = (work.num_items + kThreads - 1) / kThreads;
  const int begin = min(work.num_items, static_cast<int>(threadIdx.x) * each);
  const int end = min(work.num_items, begin + each);
  int mine = 0, total;
  for (int i = begin; i < end; ++i) mine += cost_of(work, i);
  int before = exclusive_sum(mine, total);
  for (int i = begin; i < end; ++i) {
    work.costs[i] = before;
    before += cost_of(work, i);
  }
  if (threadIdx.x == 0) work.costs[work.num_items] = total;
  __syncthreads();
  return total;
}

// The cut nearest below `cost` that leaves no tiny piece.
__device__ Cut cut_at(const Work& work, int cost) {
  int low = 0, high = work.num_items;  // costs[low] <= cost < costs[high + 1]
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (work.costs[middle] <= cost) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low >= work.num_items) return {work.num_items, 0};
  const int tiles = stream_of(work, work.items[low]).tiles;
  const int done = (cost - work.costs[low] - kItemCost) / kTileCost;
  if (done < kFewestTiles) return {low, 0};
  if (tiles - done < kFewestTiles) return {low + 1, 0};
  return {low, done};
}

}  // namespace
}  // namespace compactattn

extern "C" __global__ void __launch_bounds__(1024, 1)
    compactattn_plan(const __grid_constant__ compactattn::Work work) {
  using namespace compactattn;
  const int total = sum_costs(work);
  const int shares = max(1, min(work.num_ctas, total / kLeastCost));
  for (int cta = threadIdx.x; cta <= work.num_ctas; cta += kThreads) {
    const long long cost = static_cast<long long>(total) * cta / shares;
    work.cuts[cta] = cta >= shares ? Cut{work.num_items, 0} : cut_at(work, static_cast<int>(cost));
  }
}
