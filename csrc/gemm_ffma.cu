// Instantiations of the float32 kernel: 3 types x 2 vector lengths x kFfmaWidths.
#include "gemm_ffma.cuh"
#include "kernels.h"

namespace rwn {
namespace {

template <class T>
Function of_type(const Plan& plan) {
  return pick<kFfmaWidths>(plan.width, [&](auto width) -> Function {
    return plan.vector == 4 ? gemm_ffma_kernel<T, 4, width> : gemm_ffma_kernel<T, 1, width>;
  });
}

}  // namespace

Function gemm_ffma_function(const Plan& plan) {
  return pick_type(plan, [&](auto zero) { return of_type<decltype(zero)>(plan); });
}

}  // namespace rwn
