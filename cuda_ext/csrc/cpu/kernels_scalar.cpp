// The kernels compiled for one instruction set; the flags come from CMakeLists.txt.
#define SLIPSTREAM_ISA scalar

#include "block_attention.h"
#include "likely.h"
#include "linear.h"
#include "rows.h"

namespace slipstream {
const Kernels kScalarKernels = {
    .name = "scalar",
    .scratch_floats = scalar::scratch_floats,
    .attend = scalar::attend,
    .combine = scalar::combine,
    .rotate = scalar::rotate,
    .copy = scalar::copy,
    .add_and_normalise = scalar::add_and_normalise,
    .gate = scalar::gate,
    .likely = scalar::likely,
    .linear = scalar::linear,
};
}  // namespace slipstream
