// The order of lists as plan finds it, against a sort on the host, and the place of items KV head
// by KV head, against counting them:
//   g++ -O2 -std=c++17 -D__host__= -D__device__= order_host.cpp && ./a.out
#define HOST_THREADS 1024
#include <numeric>
#include <random>
#include <vector>

// What stands for the device comes before what is made for it.
// clang-format off
#include "cta_host.h"
#include "../../cuda/plan/order.cuh"
// clang-format on

namespace {

int count;
std::vector<uint32_t> tiles;
std::vector<int> items;
compactattn::ListOrder near;

void order() {
  const int list = host::current;
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
  host::run(order);
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
