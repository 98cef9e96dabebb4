// The angles of rotary embeddings against f64, on the host:
//   g++ -O2 -std=c++17 -ffp-contract=off -D__host__= -D__device__= turns_host.cpp && ./a.out
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "../../cuda/select/turn.cuh"

using compactattn::Turn;
using compactattn::turn_by;

namespace {

// The result rounds by half an ulp of a number below 1, the reduced angle by as much and the sum
// before the last one by less:
// one ulp of 1 together.
constexpr double kTolerance = 1.2e-7;

double error_at(float angle) {
  const Turn turn = turn_by(angle);
  const double cos = std::fabs(turn.cos - std::cos(static_cast<double>(angle)));
  return std::fmax(cos, std::fabs(turn.sin - std::sin(static_cast<double>(angle))));
}

// Every 61st float of either sign from 2^-126 to 2^48.
double worst() {
  double worst = 0;
  const uint32_t first = 0x00800000u, last = 0x57800000u;
  for (uint32_t bits = first; bits < last; bits += 61) {
    float angle;
    std::memcpy(&angle, &bits, sizeof angle);
    worst = std::fmax(worst, std::fmax(error_at(angle), error_at(-angle)));
  }
  return worst;
}

}  // namespace

int main() {
  const double error = std::fmax(error_at(0.0f), worst());
  const bool is_nan = std::isnan(turn_by(INFINITY).sin) && std::isnan(turn_by(NAN).cos);
  std::printf("angles: largest error %.3g of %.3g allowed, NaN %s\n", error, kTolerance,
              is_nan ? "kept" : "lost");
  return error <= kTolerance && is_nan ? 0 : 1;
}
