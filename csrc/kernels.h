// The compiled kernels: which function a plan runs. One .cu file a family holds its instantiations.
#pragma once
#include <cstddef>
#include <utility>

#include "numbers.h"
#include "plan.h"

namespace rwn {

using Function = void (*)(Task);

// Null where the plan names an instantiation that this build does not hold.
Function gemm_ffma_function(const Plan& plan);
Function gemm_mma_function(const Plan& plan);
Function gemm_wgmma_function(const Plan& plan);
Function depthwise_function(const Plan& plan);

Function function_of(const Plan& plan);

// Bit int(Kernel) of what this build holds for a device of this compute capability.
unsigned kernels_built(int capability);

// The function that `make(T())` gives for the plan's element type T.
template <class Make>
Function pick_half_type(const Plan& plan, Make make) {
  return plan.problem.type == Type::bfloat16 ? make(bf16()) : make(f16());
}
template <class Make>
Function pick_type(const Plan& plan, Make make) {
  return plan.problem.type == Type::float32 ? make(float()) : pick_half_type(plan, make);
}

// The function that `make(constant)` gives for the compile-time constant equal to `width`; one of `widths`.
template <const auto& widths, class Make, std::size_t... I>
Function pick(int width, Make make, std::index_sequence<I...>) {
  Function found = nullptr;
  ((widths[I] == width ? void(found = make(std::integral_constant<int, widths[I]>())) : void()), ...);
  return found;
}
template <const auto& widths, class Make>
Function pick(int width, Make make) {
  return pick<widths>(width, make, std::make_index_sequence<sizeof(widths) / sizeof(widths[0])>());
}

}  // namespace rwn
