// Rows of bits, one bit a KV block: bit j of a row is bit j % 32 of its word j / 32.
#pragma once

#include <cstdint>

namespace compactattn {

// Words that hold `bits` bits.
__host__ __device__ inline int words_of(int bits) { return bits / 32 + (bits % 32 != 0); }

// The bits of word `word` that lie in begin..end; none where end <= begin.
__host__ __device__ inline uint32_t range_word(int word, int begin, int end) {
  const int first = word * 32;
  const int low = begin > first ? begin - first : 0;
  const int high = end - first < 32 ? end - first : 32;
  if (low >= high) return 0;
  return (0xffffffffu >> (32 - (high - low))) << low;
}

// The lowest `count` set bits of `word`.
__host__ __device__ inline uint32_t lowest_bits(uint32_t word, int count) {
  uint32_t out = 0;
  for (; word != 0 && count > 0; --count) {
    const uint32_t low = word & (0u - word);
    out |= low;
    word ^= low;
  }
  return out;
}

}  // namespace compactattn
