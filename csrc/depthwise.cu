// Instantiations of the depthwise kernel: kDepthwiseSizes x (float32, and 2 types x 2 vector lengths) x (stride 1, any).
#include "depthwise.cuh"
#include "kernels.h"

namespace rwn {
namespace {

template <class T, int SIZE, int VECTOR>
Function of_stride(const Problem& p) {
  // Four outputs share their input columns; of large filters two do, for the registers' sake.
  constexpr int kAtOnce = SIZE * VECTOR < 7 ? 4 : 2;
  const bool dense = p.stride_w == 1 && p.dilation_w == 1;
  return dense ? depthwise_kernel<T, SIZE, VECTOR, kAtOnce> : depthwise_kernel<T, SIZE, VECTOR, 1>;
}

template <class T>
Function of_type(const Plan& plan) {
  return pick<kDepthwiseSizes>(plan.width, [&](auto size) -> Function {
    if constexpr (sizeof(T) == 2) {
      if (plan.vector == 2) return of_stride<T, size, 2>(plan.problem);
    }
    return of_stride<T, size, 1>(plan.problem);
  });
}

}  // namespace

Function depthwise_function(const Plan& plan) {
  return pick_type(plan, [&](auto zero) { return of_type<decltype(zero)>(plan); });
}

}  // namespace rwn
