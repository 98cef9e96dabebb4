// Cosine and sine of the angles of rotary embeddings: position * frequency, rounded to f32.
#pragma once

#include <cmath>
#include <cstdint>

namespace compactattn {

struct Turn {
  float cos;
  float sin;
};

// An angle as quarter turns and a rest, |rest| < 0.92: pi / 4, and what rounding adds.
struct Quarters {
  float rest;
  int64_t count;
};

// Up to here a count of quarters has 20 bits. The first product below then ends at 2^-23 or above,
// and its difference from the angle, less than 1, is exact.
constexpr float kNearAngle = 1048576.0f;

// pi / 2 as a sum of numbers that each round what the ones before leave.
__host__ __device__ inline Quarters quarters_of(float angle) {
  if (fabsf(angle) < kNearAngle) {
    const float n = rintf(angle * 0.636619772f);
    const float rest = fmaf(-n, -4.37113883e-8f, fmaf(-n, 1.57079637f, angle));
    return {fmaf(-n, -1.71512450e-15f, rest), static_cast<int64_t>(n)};
  }
  const double n = rint(angle * 0.63661977236758134);
  const double rest = fma(-n, 6.123233995736766e-17, fma(-n, 1.5707963267948966, angle));
  return {static_cast<float>(rest), static_cast<int64_t>(n)};
}

// Within 1.2e-7, an ulp of 1, for |angle| < 2^48. In place of `sincosf`, whose reduction of large
// angles keeps an array of words in local memory wherever it is inlined.
__host__ __device__ inline Turn turn_by(float angle) {
  const Quarters at = quarters_of(angle);
  const float x = at.rest, square = x * x;
  // The polynomials of least error over |x| < 0.92: 3e-11 of the sine, 5e-10.
  float sin = fmaf(square, 2.7045103e-06f, -0.00019837638f);
  sin = fmaf(square, fmaf(square, sin, 0.0083333235f), -0.16666667f);
  sin = fmaf(x * square, sin, x);
  float cos = fmaf(square, 2.4304623e-05f, -0.0013886035f);
  cos = fmaf(square, fmaf(square, cos, 0.041666616f), -0.5f);
  cos = fmaf(square, cos, 1.0f);
  const float c = at.count & 1 ? sin : cos, s = at.count & 1 ? cos : sin;
  return {(at.count + 1) & 2 ? -c : c, at.count & 2 ? -s : s};
}

}  // namespace compactattn
