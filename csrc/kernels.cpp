// What this build holds. RWN_ARCHS lists the architectures that it was compiled for, RWN_HAS_... the families.
#include "kernels.h"

namespace rwn {

Function function_of(const Plan& plan) {
  switch (plan.kernel) {
    case Kernel::ffma: return gemm_ffma_function(plan);
    case Kernel::depthwise: return depthwise_function(plan);
#ifdef RWN_HAS_MMA
    case Kernel::mma: return gemm_mma_function(plan);
#endif
#ifdef RWN_HAS_WGMMA
    case Kernel::wgmma: return gemm_wgmma_function(plan);
#endif
    default: return nullptr;
  }
}

unsigned kernels_built([[maybe_unused]] int capability) {
  unsigned kernels = 1u << int(Kernel::ffma) | 1u << int(Kernel::depthwise);
#ifdef RWN_HAS_MMA
  kernels |= 1u << int(Kernel::mma);
#endif
#ifdef RWN_HAS_WGMMA
  if (capability == 90) kernels |= 1u << int(Kernel::wgmma);
#endif
  return kernels;
}

}  // namespace rwn
