// Instantiations of the wgmma kernel: 2 types x kWgmmaWidths x (64, 128 channels a block).
#include "gemm_wgmma.cuh"
#include "kernels.h"

namespace rwn {
namespace {

template <class T>
Function of_type(const Plan& plan) {
  return pick<kWgmmaWidths>(plan.width, [&](auto width) -> Function {
    return plan.task.tile_channels == 128 ? gemm_wgmma_kernel<T, width, 2> : gemm_wgmma_kernel<T, width, 1>;
  });
}

}  // namespace

Function gemm_wgmma_function(const Plan& plan) {
  return pick_half_type(plan, [&](auto zero) { return of_type<decltype(zero)>(plan); });
}

}  // namespace rwn
