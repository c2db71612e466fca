// The inner loops for AVX2 with FMA.
#define LANES 8
#define COLUMNS 6
#include "correlate.h"
#include "depthwise.h"

namespace rwn::cpu {
extern const Code avx2 = {"avx2", TILE, LANES, correlate, scratch_floats, gradient_halo, correlate_depthwise};
}
