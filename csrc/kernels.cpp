// What this build holds. RWN_..._ARCHS list the code of a family as CMake names it: "75-virtual,80-real,90a-real".
#include "kernels.h"

#include <sstream>
#include <string>

namespace rwn {
namespace {

// Whether one of these can run on a device of this compute capability: the machine code of its major version up to its
// minor one (of an "a" architecture itself alone), or PTX, which the driver compiles.
bool runs_on(const char* archs, int capability) {
  std::istringstream list(archs);
  for (std::string arch; std::getline(list, arch, ',');) {
    std::size_t digits = 0;
    const int number = std::stoi(arch, &digits);
    const bool single = arch[digits] == 'a', ptx = arch.find("-virtual") != std::string::npos;
    if (single ? number == capability : number <= capability && (ptx || number / 10 == capability / 10)) return true;
  }
  return false;
}

}  // namespace

Function function_of(const Plan& plan) {
  switch (plan.kernel) {
    case Kernel::ffma: return gemm_ffma_function(plan);
    case Kernel::depthwise: return depthwise_function(plan);
#ifdef RWN_MMA_ARCHS
    case Kernel::mma: return gemm_mma_function(plan);
#endif
#ifdef RWN_WGMMA_ARCHS
    case Kernel::wgmma: return gemm_wgmma_function(plan);
#endif
    default: return nullptr;
  }
}

unsigned kernels_built(int capability) {
  unsigned kernels = 0;
  if (runs_on(RWN_PLAIN_ARCHS, capability)) kernels |= 1u << int(Kernel::ffma) | 1u << int(Kernel::depthwise);
#ifdef RWN_MMA_ARCHS
  if (runs_on(RWN_MMA_ARCHS, capability)) kernels |= 1u << int(Kernel::mma);
#endif
#ifdef RWN_WGMMA_ARCHS
  if (runs_on(RWN_WGMMA_ARCHS, capability)) kernels |= 1u << int(Kernel::wgmma);
#endif
  return kernels;
}

}  // namespace rwn
