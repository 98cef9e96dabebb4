// Which blocks of a row stay, by the code of the kernels, against sorting the row:
//   g++ -O2 -std=c++17 -D__host__= -D__device__= keep_host.cpp && ./a.out
#define HOST_THREADS 512
#define COMPACTATTN_CTA_THREADS HOST_THREADS
#include <cmath>
#include <random>

// What stands for the device comes before what is made for it.
// clang-format off
#include "cta_host.h"
#include "../../cuda/union/keep.cuh"
// clang-format on

using namespace compactattn;

namespace {

constexpr int kCases = 600;
constexpr uint32_t kDirt = 0x5a5a5a5au;

Settings settings;
std::vector<float> scores;
std::vector<uint32_t> bits;
bool surveyed;

void thread() {
  const Row row = row_of(settings, scores.data(), static_cast<int>(scores.size()));
  if (!surveyed) return keep(settings, row, bits.data());
  keep(settings, row, bits.data(), true, survey(row, settings.keep_value));
}

// Blocks first .. end, best first, of equal ones the first.
std::vector<int> ranked(int first, int end) {
  std::vector<int> order(end - first);
  std::iota(order.begin(), order.end(), first);
  const auto better = [](int a, int b) { return rank_of(scores[a]) > rank_of(scores[b]); };
  std::stable_sort(order.begin(), order.end(), better);
  return order;
}

// How many of the best free blocks reach the share of mass that forced ones do not hold.
int count_by_mass(const Row& row, const std::vector<int>& free) {
  float heaviest = settings.mass_counts_open ? 1.0f : 0.0f;
  for (const float score : scores)
    if (mass_bits(score) > bits_of(heaviest)) heaviest = score;
  const FixedPoint mass(bits_of(heaviest), row.n);
  uint64_t past = 0, of_free = 0;
  for (const float score : scores) past += mass.of(score);
  for (const int block : free) of_free += mass.of(scores[block]);
  const uint64_t whole = settings.mass_counts_open ? std::max(past, mass.of(1.0f)) : past;
  const uint64_t target = share_of_mass(settings.keep_value, whole);
  uint64_t held = whole - of_free;  // forced and open
  int count = 0;
  while (held < target) held += mass.of(scores[free[count++]]);
  return count;
}

std::vector<bool> wanted() {
  const Row row = row_of(settings, scores.data(), static_cast<int>(scores.size()));
  const std::vector<int> free = ranked(row.first_free, row.end_free), all = ranked(0, row.n);
  const auto is_free = [&](int j) { return j >= row.first_free && j < row.end_free; };
  const auto is_kept = [&](int j) { return rank_of(scores[j]) >= rank_of(settings.keep_value); };
  const auto unjudged = std::count_if(free.begin(), free.end(),
                                      [](int j) { return rank_of(scores[j]) == kUnjudged; });
  int rule = share_of(settings.keep_value, row.n) - row.forced();
  if (settings.keep == kThreshold)
    rule = static_cast<int>(std::count_if(free.begin(), free.end(), is_kept));
  if (settings.keep == kMass) rule = count_by_mass(row, free);
  int floor = share_of(settings.min_density, row.n);
  if (const int budget = std::min(settings.min_budget, row.n); budget > 0) {
    const auto more = std::count_if(all.begin(), all.begin() + budget, is_free);
    floor = std::max(floor, row.forced() + static_cast<int>(more));
  }
  const int cap = share_of(settings.max_density, row.n);
  int count = std::min(std::max(rule + row.forced(), floor), cap) - row.forced();
  count = std::min(std::max(count, static_cast<int>(unjudged)), row.free());
  std::vector<bool> kept(row.n);
  for (int i = 0; i < count; ++i) kept[free[i]] = true;
  return kept;
}

// Ties, zeros, falling ones over many powers of two, and what cannot be judged.
void draw(std::mt19937& rng) {
  constexpr int kLengths[] = {1, 2, 7, 31, 33, 100, 257, 600, 1500, 4096, 5000};
  constexpr float kOdd[] = {NAN, INFINITY, -INFINITY, -1.0f, -0.0f, 1e-44f};
  constexpr float kShares[] = {0.0f, 0.05f, 0.3f, 0.5f, 0.9f, 0.95f, 1.0f};
  const auto upto = [&](int n) { return static_cast<int>(rng() % n); };
  const auto unit = [&] { return static_cast<float>(rng() >> 8) * 0x1p-24f; };
  scores.resize(kLengths[upto(11)]);
  const int n = static_cast<int>(scores.size()), style = upto(6), odd = upto(3);
  const int odd_each = upto(2) ? 40 : 4;
  for (float& x : scores) {
    const float u = unit();
    x = style == 0   ? u
        : style == 1 ? std::exp2(-60 * u)
        : style == 2 ? std::floor(5 * u) / 8
        : style == 3 ? (u < 0.9f ? 0.0f : u)
        : style == 4 ? 0.25f
                     : std::exp2(-8 * u) / static_cast<float>(n);
    if (odd == 0 && upto(odd_each) == 0) x = kOdd[upto(6)];
  }
  settings = {};
  settings.keep = static_cast<Keep>(upto(3));
  settings.keep_value = settings.keep == kThreshold ? (upto(3) ? unit() : 0.25f) : kShares[upto(7)];
  settings.min_density = upto(3) ? 0 : unit();
  settings.max_density = upto(3) ? 1 : unit() * (upto(2) ? 1 : 0.1f);
  settings.min_budget = upto(3) ? 0 : upto(n + 10);
  settings.sink_blocks = upto(9) ? upto(4) : n;
  settings.local_blocks = upto(5);
  settings.mass_counts_open = upto(2);
  surveyed = upto(2);
  bits.assign((n + 31) / 32, kDirt);
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  for (int i = 0; i < kCases; ++i) {
    draw(rng);
    host::run(thread);
    const std::vector<bool> right = wanted();
    const Row row = row_of(settings, scores.data(), static_cast<int>(scores.size()));
    for (int j = row.first_free; j < row.end_free; ++j) {
      if ((bits[j / 32] >> j % 32 & 1) == right[j]) continue;
      std::printf("case %d: block %d of %zu is %s\n", i, j, scores.size(), right[j] ? "out" : "in");
      return 1;
    }
  }
  std::puts("rows keep the blocks that a sort keeps");
}
