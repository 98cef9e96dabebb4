// Scalar instructions without a name in CUDA C++.
#pragma once

namespace compactattn::ptx {

// 2^x by the special function unit, relative error 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), absolute error 2^-22 for x in [0.5, 2] and relative 2^-22 outside; -inf for 0.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What follows from the result is computed no earlier than here: a compiler that moves it out of a
// loop has it in registers throughout.
__device__ __forceinline__ int not_before(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace compactattn::ptx
