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

// Reads and waits after this are not lifted over the arithmetic behind `sum`, which is no less than
// 0 or NaN: the assembler does not know that the barrier is all lanes'. All lanes call it.
__device__ __forceinline__ void wait_no_earlier(float sum) {
  const unsigned all = __ballot_sync(0xffffffffu, !(sum < 0.0f));
  asm volatile("bar.warp.sync %0;" : : "r"(all) : "memory");
}

}  // namespace compactattn::ptx
