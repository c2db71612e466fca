// The inner loops for any machine of the kind compiled for: registers of four floats (SSE2, NEON).
#define LANES 4
#define COLUMNS 6
#include "correlate.h"
#include "depthwise.h"

namespace rwn::cpu {
extern const Code baseline = {"baseline", TILE, LANES, correlate, scratch_floats, gradient_halo, correlate_depthwise};
}
