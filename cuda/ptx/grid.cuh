// Kernels of one stream that overlap: programmatic dependent launch, sm_90 and later.
#pragma once

namespace compactattn::ptx {

// First thing in every kernel that rust/cuda/kernels.rs lets overlap, by all its threads: returns
// when all kernels before it are done and what they wrote can be seen, then lets the next one start
// as far as its own call of this. Kernels end in order because each waits for the one before, so
// none may leave before. Does nothing for a launch without the attribute.
__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "griddepcontrol.wait;\n\t"
      "griddepcontrol.launch_dependents;" ::
          : "memory");
#endif
}

}  // namespace compactattn::ptx
