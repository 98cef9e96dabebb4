// compactattn_check_lists on the host, a thread of the CTA a thread: rows as table writes them
// pass, damaged ones do not.
//   g++ -O2 -std=c++17 -pthread -D__host__= -D__device__= check_host.cpp && ./a.out
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

// ---- what CUDA provides ----

struct Index {
  unsigned x;
};
constexpr unsigned kCta = 256;
static thread_local Index threadIdx;
static Index blockIdx;

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> guard(lock_);
    const unsigned turn = turn_;
    if (++here_ == kCta) {
      here_ = 0;
      ++turn_;
      all_.notify_all();
    } else {
      all_.wait(guard, [&] { return turn != turn_; });
    }
  }

 private:
  std::mutex lock_;
  std::condition_variable all_;
  unsigned here_ = 0, turn_ = 0;
};
static Barrier barrier;
static int64_t lanes[kCta];

inline void __syncthreads() { barrier.wait(); }
template <class T>
T exchanged(T mine, unsigned from) {
  lanes[threadIdx.x] = mine;
  barrier.wait();
  const T got = static_cast<T>(lanes[from]);
  barrier.wait();
  return got;
}
// Every call is made by the whole CTA.
template <class T>
T __shfl_up_sync(unsigned, T mine, int d) {
  const unsigned lane = threadIdx.x % 32;
  return exchanged(mine, lane >= static_cast<unsigned>(d) ? threadIdx.x - d : threadIdx.x);
}
template <class T>
T __shfl_sync(unsigned, T mine, int lane) {
  return exchanged(mine, threadIdx.x / 32 * 32 + lane);
}
inline int __reduce_add_sync(unsigned, int mine) {
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += __shfl_sync(0, mine, lane);
  return sum;
}
inline int __syncthreads_or(int mine) {
  lanes[threadIdx.x] = mine;
  barrier.wait();
  int any = 0;
  for (const int64_t lane : lanes) any |= lane != 0;
  barrier.wait();
  return any;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline void atomicAdd(unsigned long long* to, unsigned long long x) { *to += x; }
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
#define __shared__ static
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#include "../../cuda/check/lists.cu"

// ---- rows and their damage ----

using namespace compactattn;

namespace {

struct World {
  Step step{};
  Counters counters{};
  Span span{};
  Stats stats{};
  std::vector<int32_t> pages, boxes;
  std::vector<uint32_t> bits;
  int32_t count = 0, tokens = 0;
};

// Words of bits that the CTA takes at once hold 8192 blocks: lists of seeds from here on have more.
constexpr unsigned kLongSeed = 100;

// One list of one request, as cuda/table/row.cuh writes it, but one box after the other.
void make(World& w, unsigned seed, bool with_bits) {
  std::mt19937 rng(seed);
  const auto below = [&](int n) { return static_cast<int>(rng() % n); };
  Layout& layout = w.step.layout;
  layout.lists_per_kv_head = layout.num_kv_heads = 1;
  layout.log2_page_tokens = 4 + below(5);
  const bool is_long = seed >= kLongSeed;
  layout.log2_block_tokens = 4 + (is_long ? 0 : below(5));
  layout.log2_box_tokens = std::min(layout.log2_page_tokens, layout.log2_block_tokens);
  const int kv = is_long ? 290000 + below(100000) : 600 + below(below(4) == 0 ? 400000 : 6000);
  const int most = kv + 500;
  const int total = pieces_of_log2(kv, layout.log2_block_tokens);
  layout.max_boxes = pieces_of_log2(most, layout.log2_box_tokens);
  layout.mask_words = words_of(pieces_of_log2(most, layout.log2_block_tokens));
  w.span.kv_end = kv;
  w.step.batch.num_pages = pieces_of_log2(kv, layout.log2_page_tokens) + 7;
  w.pages.resize(w.step.batch.num_pages);
  for (size_t i = 0; i < w.pages.size(); ++i) w.pages[i] = static_cast<int32_t>(i);
  for (size_t i = w.pages.size(); i > 1; --i) std::swap(w.pages[i - 1], w.pages[below(i)]);
  w.bits.assign(layout.mask_words, 0xffffffffu);  // after the last block nothing counts
  w.boxes.assign(layout.max_boxes, -5);
  const int one_in = 1 + below(6), log2_per_page = layout.log2_page_tokens - layout.log2_box_tokens;
  for (int block = 0; block < total; ++block) {
    const bool kept = block < 2 || below(one_in) == 0 || (block == total - 1 && below(2));
    if (!kept) {
      w.bits[block / 32] &= ~(1u << block % 32);
      continue;
    }
    const int end = std::min((block + 1) << layout.log2_block_tokens, kv);
    for (int t = block << layout.log2_block_tokens; t < end; t += 1 << layout.log2_box_tokens) {
      const int box = t >> layout.log2_box_tokens, part = box & ((1 << log2_per_page) - 1);
      w.boxes[w.count++] = (w.pages[box >> log2_per_page] << log2_per_page) + part;
    }
    w.tokens += end - (block << layout.log2_block_tokens);
  }
  w.counters.num_list_spans = 1;
  w.step.batch.block_table = w.pages.data();
  Stages& stages = w.step.stages;
  stages.counters = &w.counters;
  stages.list_spans = &w.span;
  stages.lists = with_bits ? w.bits.data() : nullptr;
  stages.boxes = w.boxes.data();
  stages.counts = &w.count;
  stages.stream_lens = &w.tokens;
  stages.stats = &w.stats;
}

// Runs the CTA; whether the row was counted as damaged, and then emptied.
bool finds_damage(World& w) {
  const uint64_t before = w.stats.refused;
  int32_t out[2] = {-9, -9};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kCta; ++i) {
    threads.emplace_back([&w, &out, i] {
      threadIdx = {i};
      compactattn_check_lists(w.step, &out[0], &out[1]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const bool counted = w.stats.refused - before == 1;
  const bool emptied = out[0] == 0 && out[1] == 0, kept = out[0] == w.count && out[1] == w.tokens;
  if (counted ? emptied : kept) return counted;
  std::printf("counted %d, but %d boxes of %d tokens\n", counted, out[0], out[1]);
  std::exit(1);
}

struct Damage {
  const char* name;
  bool shows_without_bits;
  void (*make)(World&);
};

const Damage kDamage[] = {
    {"another page of the pool", false, [](World& w) { w.boxes[0] ^= 1; }},
    {"two boxes exchanged", false, [](World& w) { std::swap(w.boxes[0], w.boxes[w.count - 1]); }},
    {"a box twice", false, [](World& w) { w.boxes[1] = w.boxes[0]; }},
    {"the engine's table edited too early", false,
     [](World& w) { std::swap(w.pages[0], w.pages.back()); }},
    {"a bit less", false, [](World& w) { w.bits[0] &= ~2u; }},
    {"another page late in the list", false, [](World& w) { w.boxes[w.count - 2] ^= 1; }},
    {"a page outside the pool", true, [](World& w) { w.boxes[w.count - 1] = INT32_MAX; }},
    {"a negative page", true, [](World& w) { w.boxes[w.count / 2] = -1; }},
    {"a smaller pool", true, [](World& w) { w.step.batch.num_pages = 1; }},
    {"a box less", true, [](World& w) { --w.count; }},
    {"a box more", true, [](World& w) { ++w.count; }},
    {"more boxes than there is room for", true, [](World& w) { w.count = INT32_MAX; }},
    {"boxes below none", true, [](World& w) { w.count = -1; }},
    {"far more tokens", true, [](World& w) { w.tokens += 1 << w.step.layout.log2_box_tokens; }},
};

void row(unsigned seed, bool with_bits) {
  for (const Damage& damage : kDamage) {
    World w;
    make(w, seed, with_bits);
    if (&damage == kDamage && finds_damage(w)) {
      std::printf("a good row is refused, seed %u, bits %d\n", seed, with_bits);
      std::exit(1);
    }
    damage.make(w);
    if (finds_damage(w) || (!with_bits && !damage.shows_without_bits)) continue;
    std::printf("not found: %s, seed %u, bits %d\n", damage.name, seed, with_bits);
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (const unsigned seed : {0u, 1u, 2u, 3u, kLongSeed}) {
    row(seed, true);
    row(seed, false);
  }
  std::printf("checked mode finds what is damaged and nothing else\n");
}
