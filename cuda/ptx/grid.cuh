// CTAs of a grid and grids of a stream among each other.
#pragma once

namespace compactattn::ptx {

// Orders this thread's reads and writes before and after it for the whole device.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Programmatic dependent launch, sm_90 and later: kernels of one stream that overlap.
//
// In every kernel that rust/cuda/kernels.rs lets overlap: returns when all kernels before it are
// done and what they wrote can be seen, then lets the next one start as far as its own call of
// this. So before the call a kernel sees what all wrote but the one right before it, and what the
// step was given: some read that early (`knows_spans` of select/cells.cuh, select/foresee.cuh,
// select/mass_lists.cuh, plan/work.cu), and write nothing that outlives them. Kernels end in order
// because each waits for the one before, so no CTA may leave before. Does nothing for a launch
// without the attribute.
__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "griddepcontrol.wait;\n\t"
      "griddepcontrol.launch_dependents;" ::
          : "memory");
#endif
}

}  // namespace compactattn::ptx
