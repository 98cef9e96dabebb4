// The order of scores, shares of a row and mass in fixed point: plain numbers, for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../params.h"

namespace compactattn {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kUnjudged = kSignBit | kInfinityBits;  // rank of NaN and of +inf
constexpr double kFloatEpsilon = 1.1920928955078125e-7;   // 2^-23

__host__ __device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__host__ __device__ inline double two_to(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// floor(log2 x) of an x > 0 that no double is too narrow for.
__host__ __device__ inline int exponent_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 52) - 1023;
}

// Higher is better, in the total order of floats; NaN ranks as +inf.
__host__ __device__ inline uint32_t rank_of(float score) {
  uint32_t bits = bits_of(score);
  if ((bits & ~kSignBit) > kInfinityBits) bits = kInfinityBits;
  return bits & kSignBit ? ~bits : bits | kSignBit;
}

__host__ __device__ inline float score_of(uint32_t rank) {
  const uint32_t bits = rank & kSignBit ? rank & ~kSignBit : ~rank;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// Bits of a score's mass; 0 for what is negative or not finite. Masses order as their bits do.
__host__ __device__ inline uint32_t mass_bits(float score) {
  const uint32_t bits = bits_of(score);
  return bits < kInfinityBits ? bits : 0;
}

// ceil(share * n), at most n; the last bit of an f32 share must not buy a block.
__host__ __device__ inline int share_of(float share, int n) {
  if (share >= 1.0f) return n;
  const double product = static_cast<double>(share) * n * (1.0 - kFloatEpsilon);
  const int blocks = static_cast<int>(ceil(product));
  return blocks < n ? blocks : n;
}

// Mass as integers, so that its sums do not depend on their order: x stands for round(x * factor).
//
// The factor puts the heaviest of n masses just below 2^(62 - L), n < 2^L, so sums stay below 2^63.
// Each mass is off by at most 1/2, a sum by n / 2 where the sum is at least 2^(61 - L): a relative
// 2^(2 L - 62), which is 2^-40 for 1023 blocks and 2^-28 for 65535. A CPU that sums in f64 keeps
// the same blocks unless a prefix of the ranked row comes that close to the share.
struct FixedPoint {
  double factor;

  __host__ __device__ FixedPoint(uint32_t heaviest_bits, int n) : factor(0) {
    float heaviest;
    memcpy(&heaviest, &heaviest_bits, sizeof heaviest);
    if (!(heaviest > 0)) return;
    factor = two_to(61 - (exponent_of(n) + 1) - exponent_of(heaviest));
  }

  __host__ __device__ uint64_t of(float score) const {
    const uint32_t bits = mass_bits(score);
    if (bits == 0) return 0;
    return static_cast<uint64_t>(static_cast<double>(score) * factor + 0.5);
  }
};

// The least integer that is `share` of `all`.
__host__ __device__ inline uint64_t share_of_mass(float share, uint64_t all) {
  if (share >= 1.0f) return all;
  const double product = static_cast<double>(share) * static_cast<double>(all);
  const uint64_t target = static_cast<uint64_t>(ceil(product));
  return target < all ? target : all;
}

}  // namespace compactattn
