// The order of lists as plan finds it, against a sort on the host, and the place of items KV head
// by KV head, against counting them; a CTA's threads are fibers:
//   g++ -O2 -std=c++17 -D__host__= -D__device__= order_host.cpp && ./a.out
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

// What a CTA has on the device: barriers at which all threads meet, and shuffles at which a warp's
// do. Threads run one after the other, each up to the next of them.
namespace cta {

constexpr int kThreads = 1024, kStackBytes = 1 << 16;
enum State { kRuns, kAtBarrier, kAtShuffle, kDone };

struct Index {
  unsigned x;
};

ucontext_t scheduler, fibers[kThreads];
State states[kThreads];
uint64_t lanes[kThreads];
int current, any, any_before;
void (*body)();

void wait(State at) {
  states[current] = at;
  swapcontext(&fibers[current], &scheduler);
}

void enter() {
  body();
  wait(kDone);
}

bool all(int first, int count, State state) {
  return std::all_of(states + first, states + first + count, [=](State s) { return s == state; });
}

// Runs a warp until it waits for others, or is done.
void run_warp(int first) {
  do {
    std::fill_n(states + first, 32, kRuns);
    for (current = first; current < first + 32; ++current) {
      swapcontext(&scheduler, &fibers[current]);
    }
  } while (all(first, 32, kAtShuffle));
  if (!all(first, 32, kAtBarrier) && !all(first, 32, kDone)) std::abort();
}

void run(void (*threads)()) {
  static std::vector<char> stacks(static_cast<size_t>(kThreads) * kStackBytes);
  body = threads;
  for (int i = 0; i < kThreads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = &stacks[static_cast<size_t>(i) * kStackBytes];
    fibers[i].uc_stack.ss_size = kStackBytes;
    makecontext(&fibers[i], enter, 0);
  }
  do {
    for (int warp = 0; warp < kThreads; warp += 32) run_warp(warp);
    any_before = any;
    any = 0;
  } while (all(0, kThreads, kAtBarrier));
  if (!all(0, kThreads, kDone)) std::abort();
}

template <class T>
T shuffle(T x, int from) {
  lanes[current] = static_cast<uint64_t>(x);
  wait(kAtShuffle);
  const T other = static_cast<T>(lanes[current / 32 * 32 + from]);
  wait(kAtShuffle);
  return other;
}

}  // namespace cta

#define threadIdx (cta::Index{static_cast<unsigned>(cta::current)})
#define __shared__ static
#define __forceinline__ inline
using std::max;
using std::min;

void __syncthreads() { cta::wait(cta::kAtBarrier); }

int __syncthreads_or(int is) {
  cta::any |= is;
  cta::wait(cta::kAtBarrier);
  return cta::any_before;
}

template <class Op>
uint32_t reduce(uint32_t x, Op op) {
  cta::lanes[cta::current] = x;
  cta::wait(cta::kAtShuffle);
  const uint64_t* warp = cta::lanes + cta::current / 32 * 32;
  const uint64_t all = std::accumulate(warp + 1, warp + 32, warp[0], op);
  cta::wait(cta::kAtShuffle);
  return static_cast<uint32_t>(all);
}

uint32_t __reduce_add_sync(unsigned, uint32_t x) {
  return reduce(x, [](uint64_t a, uint64_t b) { return a + b; });
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return cta::shuffle(x, lane % 32);
}

template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = cta::current % 32;
  return cta::shuffle(x, lane < distance ? lane : lane - distance);
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return cta::shuffle(x, cta::current % 32 ^ distance);
}

#include "../../cuda/plan/order.cuh"

namespace {

int count;
std::vector<uint32_t> tiles;
std::vector<int> items;
compactattn::ListOrder near;

void order() {
  const int list = cta::current;
  const bool is_list = list < count;
  compactattn::start_longest_first(count, is_list ? tiles[list] : 0, is_list ? items[list] : 0,
                                   near);
}

// Longest first, equal ones as they are.
bool is_right() {
  std::vector<int> wanted(count);
  std::iota(wanted.begin(), wanted.end(), 0);
  const auto length = [](int list) { return min(tiles[list], compactattn::ListKey::kMostTiles); };
  const auto longer = [&](int a, int b) { return length(a) > length(b); };
  cta::run(order);
  std::stable_sort(wanted.begin(), wanted.end(), longer);
  int before = 0;
  for (const int list : wanted) {
    if (near.starts[list] != before) return false;
    before += items[list];
  }
  return true;
}

// Items of a chunk's spans, `full` items in each list but those of the last span, of `last`: those
// of a KV head together, in the order of their spans, in the places of the chunk.
bool are_placed(int num_kv_heads, int lists_per_kv_head, int spans, int full, int last) {
  const int lists = num_kv_heads * lists_per_kv_head, first = 1000;
  const int chunk = lists * ((spans - 1) * full + last);
  std::vector<int> next(num_kv_heads);
  for (int head = 0; head < num_kv_heads; ++head) next[head] = first + chunk / num_kv_heads * head;
  for (int i = 0; i < spans; ++i) {
    const int tiles = i + 1 < spans ? full : last, before = i * lists * full;
    compactattn::Span span = {};
    span.first_item = first + before;
    span.chunk_items = chunk;
    for (int at = 0; at < lists * tiles; ++at) {
      const int head = at / (lists_per_kv_head * tiles);
      if (compactattn::place_by_kv_head(span, num_kv_heads, before, lists * tiles, at) !=
          next[head]++)
        return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  for (const int lists : {0, 1, 2, 31, 32, 33, 128, 255, 256, 257, 500, 1000, 1024}) {
    for (const uint32_t lengths : {1u, 2u, 100u, 1u << 21, ~0u}) {
      count = lists;
      tiles.clear();
      items.clear();
      for (int i = 0; i < lists; ++i) {
        tiles.push_back(static_cast<uint32_t>(rng()) % lengths);
        items.push_back(static_cast<int>(rng() % 33));
      }
      if (!is_right()) {
        std::printf("not so: %d lists of up to %u tiles, the longest first\n", lists, lengths);
        return 1;
      }
    }
  }
  for (int trial = 0; trial < 2000; ++trial) {
    const auto upto = [&](int n) { return 1 + static_cast<int>(rng() % n); };
    const int full = upto(4);
    if (!are_placed(upto(9), upto(5), upto(9), full, upto(full))) {
      std::printf("not so: the items of a KV head together\n");
      return 1;
    }
  }
  std::printf("the longest lists come first, or KV head by KV head\n");
}
