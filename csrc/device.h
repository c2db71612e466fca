// What a kernel's source is written against: CUDA, or the emulator that runs the same source on a CPU.
#pragma once
#ifdef __CUDACC__
#define RWN_DEVICE __device__ __forceinline__
#define RWN_KERNEL __global__
#define RWN_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define RWN_ARGUMENT const __grid_constant__
namespace rwn {
RWN_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
}  // namespace rwn
#else
#include "checks/emulator.h"
#endif
