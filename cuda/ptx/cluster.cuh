// The CTAs of a cluster, sm_90 and later; elsewhere a CTA is alone.
#pragma once

#include <cstdint>

#include "mma.cuh"

namespace compactattn::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A barrier of all threads of the cluster, in two halves. It orders no memory but what its callers
// fence: a fence of all would wait for every load under way.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Before the arrival of a thread whose writes to shared memory the others must see.
__device__ __forceinline__ void fence_cluster() {
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
}

// Writes the first CTA's copy of a shared variable.
__device__ __forceinline__ void store_to_first(int32_t* shared, int32_t value) {
  asm volatile(
      "{\n\t"
      ".reg .u32 to;\n\t"
      "mapa.shared::cluster.u32 to, %0, 0;\n\t"
      "st.shared::cluster.u32 [to], %1;\n\t"
      "}" ::"r"(shared_address(shared)),
      "r"(value)
      : "memory");
}

// Reads a word of another CTA's copy of a shared variable.
__device__ __forceinline__ int32_t load_from(int rank, const int32_t* shared) {
  int32_t value;
  asm volatile(
      "{\n\t"
      ".reg .u32 from;\n\t"
      "mapa.shared::cluster.u32 from, %1, %2;\n\t"
      "ld.shared::cluster.u32 %0, [from];\n\t"
      "}"
      : "=r"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

// Writes a word of another CTA's copy.
__device__ __forceinline__ void store_to(int rank, uint32_t* shared, uint32_t value) {
  asm volatile(
      "{\n\t"
      ".reg .u32 to;\n\t"
      "mapa.shared::cluster.u32 to, %0, %1;\n\t"
      "st.shared::cluster.u32 [to], %2;\n\t"
      "}" ::"r"(shared_address(shared)),
      "r"(rank), "r"(value)
      : "memory");
}

__device__ __forceinline__ void store_to(int rank, float* shared, float value) {
  store_to(rank, reinterpret_cast<uint32_t*>(shared), __float_as_uint(value));
}

// Writes two words of another CTA's copy of a shared variable, 8-byte aligned.
__device__ __forceinline__ void store_to(int rank, float2* shared, float2 value) {
  asm volatile(
      "{\n\t"
      ".reg .u32 to;\n\t"
      "mapa.shared::cluster.u32 to, %0, %1;\n\t"
      "st.shared::cluster.v2.f32 [to], {%2, %3};\n\t"
      "}" ::"r"(shared_address(shared)),
      "r"(rank), "f"(value.x), "f"(value.y)
      : "memory");
}

// Writes every CTA's copy of a shared variable, in a cluster of kCtas.
template <int kCtas>
__device__ __forceinline__ void store_to_all(float* shared, float value) {
#pragma unroll
  for (int cta = 0; cta < kCtas; ++cta) {
    asm volatile(
        "{\n\t"
        ".reg .u32 to;\n\t"
        "mapa.shared::cluster.u32 to, %0, %1;\n\t"
        "st.shared::cluster.f32 [to], %2;\n\t"
        "}" ::"r"(shared_address(shared)),
        "r"(cta), "f"(value)
        : "memory");
  }
}

#else

__device__ __forceinline__ void arrive_at_cluster() { __syncthreads(); }
__device__ __forceinline__ void wait_for_cluster() {}
__device__ __forceinline__ void fence_cluster() {}

__device__ __forceinline__ void store_to_first(int32_t* shared, int32_t value) { *shared = value; }

__device__ __forceinline__ void store_to(int, float2* shared, float2 value) { *shared = value; }

__device__ __forceinline__ void store_to(int, uint32_t* shared, uint32_t value) { *shared = value; }

__device__ __forceinline__ void store_to(int, float* shared, float value) { *shared = value; }

__device__ __forceinline__ int32_t load_from(int, const int32_t* shared) { return *shared; }

template <int kCtas>
__device__ __forceinline__ void store_to_all(float* shared, float value) {
  *shared = value;
}

#endif

}  // namespace compactattn::ptx
