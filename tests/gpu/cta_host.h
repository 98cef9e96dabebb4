// A CTA on the host, its threads fibers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

// What a CTA of HOST_THREADS has on the device, for kernels' code compiled for the host: barriers
// at which all threads meet, and shuffles at which a warp's do. Threads run one after the other,
// each up to the next of them.
namespace host {

constexpr int kThreads = HOST_THREADS, kStackBytes = 1 << 16;
enum State { kRuns, kAtBarrier, kAtShuffle, kDone };

struct Index {
  unsigned x;
};

ucontext_t scheduler, fibers[kThreads];
State states[kThreads];
uint64_t lanes[kThreads];
int current, votes, votes_before;
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
    votes_before = votes;
    votes = 0;
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

}  // namespace host

#define threadIdx (host::Index{static_cast<unsigned>(host::current)})
#define __shared__ static
#define __forceinline__ inline
using std::max;
using std::min;

inline void __syncthreads() { host::wait(host::kAtBarrier); }

inline int __syncthreads_count(int is) {
  host::votes += is != 0;
  host::wait(host::kAtBarrier);
  return host::votes_before;
}

inline int __syncthreads_or(int is) { return __syncthreads_count(is) != 0; }

template <class Op>
uint32_t reduce_lanes(uint32_t x, Op op) {
  host::lanes[host::current] = x;
  host::wait(host::kAtShuffle);
  const uint64_t* warp = host::lanes + host::current / 32 * 32;
  const uint64_t all = std::accumulate(warp + 1, warp + 32, warp[0], op);
  host::wait(host::kAtShuffle);
  return static_cast<uint32_t>(all);
}

inline uint32_t __reduce_add_sync(unsigned, uint32_t x) {
  return reduce_lanes(x, [](uint64_t a, uint64_t b) { return a + b; });
}
inline int __reduce_add_sync(unsigned all, int x) {
  return static_cast<int>(__reduce_add_sync(all, static_cast<uint32_t>(x)));
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  return reduce_lanes(x, [](uint64_t a, uint64_t b) { return max(a, b); });
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t x) {
  return reduce_lanes(x, [](uint64_t a, uint64_t b) { return min(a, b); });
}
inline uint32_t __ballot_sync(unsigned, bool is) {
  const uint32_t own = is ? 1u << host::current % 32 : 0;
  return reduce_lanes(own, [](uint64_t a, uint64_t b) { return a | b; });
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return host::shuffle(x, lane % 32);
}

template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = host::current % 32;
  return host::shuffle(x, lane < distance ? lane : lane - distance);
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return host::shuffle(x, host::current % 32 ^ distance);
}

// Fibers run one after the other.
template <class T>
T atomicAdd(T* at, T more) {
  const T before = *at;
  *at += more;
  return before;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }

struct uint4 {
  uint32_t x, y, z, w;
};
