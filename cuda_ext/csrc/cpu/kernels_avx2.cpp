// The kernels compiled for one instruction set; the flags come from CMakeLists.txt.
#define SLIPSTREAM_ISA avx2

#include "block_attention.h"
#include "likely.h"
#include "linear.h"
#include "rows.h"

namespace slipstream {
const Kernels kAvx2Kernels = {
    .name = "avx2",
    .scratch_floats = avx2::scratch_floats,
    .attend = avx2::attend,
    .combine = avx2::combine,
    .rotate = avx2::rotate,
    .copy = avx2::copy,
    .add_and_normalise = avx2::add_and_normalise,
    .gate = avx2::gate,
    .likely = avx2::likely,
    .linear = avx2::linear,
};
}  // namespace slipstream
