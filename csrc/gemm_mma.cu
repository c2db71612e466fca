// Instantiations of the mma.sync kernel: 2 types x (kMmaWidths plain + kNormedWidths normed).
#include "gemm_mma.cuh"
#include "kernels.h"

namespace rwn {
namespace {

template <class T>
Function of_type(const Plan& plan) {
  if (plan.problem.normed) {
    return pick<kNormedWidths>(plan.width,
                               [](auto width) -> Function { return gemm_mma_kernel<T, width, true>; });
  }
  return pick<kMmaWidths>(plan.width, [](auto width) -> Function { return gemm_mma_kernel<T, width, false>; });
}

}  // namespace

Function gemm_mma_function(const Plan& plan) {
  return pick_half_type(plan, [&](auto zero) { return of_type<decltype(zero)>(plan); });
}

}  // namespace rwn
