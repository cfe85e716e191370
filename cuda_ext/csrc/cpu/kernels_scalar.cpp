// The kernels compiled for one instruction set; the flags come from CMakeLists.txt.
#define SLIPSTREAM_ISA scalar

#include "block_attention.h"
#include "linear.h"
#include "rotary.h"

namespace slipstream {
const Kernels kScalarKernels = {
    "scalar", scalar::scratch_floats, scalar::attend, scalar::combine, scalar::rotate, scalar::copy, scalar::linear,
};
}  // namespace slipstream
