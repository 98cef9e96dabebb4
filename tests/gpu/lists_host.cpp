// The plain arithmetic of keep, union and table on the host, bit by bit:
//   g++ -std=c++17 -D__host__= -D__device__= lists_host.cpp && ./a.out
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../../cuda/common/bits.cuh"
#include "../../cuda/common/spans.cuh"
#include "../../cuda/union/rank.cuh"

using namespace compactattn;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

void words_hold_their_range() {
  for (int begin = 0; begin < 70; ++begin) {
    for (int end = 0; end < 100; ++end) {
      for (int j = 0; j < 128; ++j) {
        const bool in = range_word(j / 32, begin, end) >> (j % 32) & 1;
        check(in == (j >= begin && j < end), "range_word");
      }
    }
  }
  check(range_word(0, 0, std::numeric_limits<int>::max()) == ~0u, "range_word to the end");
  check(lowest_bits(0xf0f0u, 5) == 0x10f0u && lowest_bits(0xf0u, 9) == 0xf0u, "lowest_bits");
  check(lowest_bits(~0u, 0) == 0 && lowest_bits(~0u, -3) == 0, "lowest_bits of none");
}

void ranks_order_as_scores_do() {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> rising{-inf,   -3e38f, -1.0f, -1e-45f, -0.0f, 0.0f,
                                  1e-45f, 1e-38f, 0.5f,  1.0f,    3e38f, inf};
  for (size_t i = 1; i < rising.size(); ++i) {
    check(rank_of(rising[i - 1]) < rank_of(rising[i]), "rank_of");
    check(bits_of(score_of(rank_of(rising[i]))) == bits_of(rising[i]), "score_of");
  }
  check(rank_of(nan) == kUnjudged && rank_of(-nan) == kUnjudged && rank_of(inf) == kUnjudged,
        "NaN");
  check(rank_of(-inf) > 1, "ranks leave room below");
}

void shares_round_up_but_not_by_a_last_bit() {
  for (int percent = 1; percent <= 100; ++percent) {
    const float share = static_cast<float>(percent) / 100;
    check(share_of(share, 100) == percent && share_of(share, 700) == percent * 7, "share_of");
  }
  check(share_of(0.41f, 5) == 3 && share_of(0.4f, 5) == 2 && share_of(0.0f, 9) == 0, "share_of 5");
}

// Nothing wraps, whatever the heaviest mass, and sums are as near as FixedPoint says.
void masses_add_up() {
  for (const int n : {1, 2, 1000, 1023, 1024, 65535, 65536, 1 << 20}) {
    int length = 0;
    while (n >> length) ++length;
    for (const float heaviest : {1e-45f, 1e-38f, 0.3f, 1.0f, 3.4e38f}) {
      const FixedPoint mass(bits_of(heaviest), n);
      const uint64_t top = mass.of(heaviest);
      check(top <= 1ull << (62 - length) && top >= 1ull << (61 - length), "the heaviest mass");
      const float third = heaviest / 3;
      const double off = mass.of(third) / mass.factor - third;
      check(std::fabs(off) * n <= std::ldexp(heaviest, 2 * length - 62), "the error of a sum");
    }
    check(FixedPoint(0, n).of(0.0f) == 0, "no mass");
  }
  check(share_of_mass(1.0f, ~0ull >> 1) == ~0ull >> 1 && share_of_mass(0.5f, 8) == 4,
        "share_of_mass");
}

void spans_vote_from_the_first() {
  Step step{};
  step.layout.select_span = 16;
  step.settings.non_voting_spans = 3;
  check(voting_selects(step, 300) == 16 && voting_selects(step, 20) == 1, "voting_selects");
  step.settings.non_voting_spans = 0;
  check(voting_selects(step, 300) == 19, "all vote");
}

}  // namespace

int main() {
  words_hold_their_range();
  ranks_order_as_scores_do();
  shares_round_up_but_not_by_a_last_bit();
  masses_add_up();
  spans_vote_from_the_first();
  std::printf("the host's arithmetic is right\n");
}
