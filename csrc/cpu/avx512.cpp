// The inner loops for AVX-512.
#define LANES 16
#define COLUMNS 12
#include "correlate.h"
#include "depthwise.h"

namespace rwn::cpu {
extern const Code avx512 = {"avx512", TILE, LANES, correlate, scratch_floats, gradient_halo, correlate_depthwise};
}
