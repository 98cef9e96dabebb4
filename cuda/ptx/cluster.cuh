// The CTAs of a cluster, sm_90 and later; elsewhere a CTA is alone.
#pragma once

#include <cstdint>

#include "mma.cuh"

namespace compactattn::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// All threads of the cluster; what they wrote before can be seen after.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
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

#else

__device__ __forceinline__ void sync_cluster() { __syncthreads(); }

__device__ __forceinline__ void store_to_first(int32_t* shared, int32_t value) { *shared = value; }

#endif

}  // namespace compactattn::ptx
