// The kernels compiled for one instruction set; the flags come from CMakeLists.txt.
#define SLIPSTREAM_ISA avx512

#include "block_attention.h"
#include "likely.h"
#include "linear.h"
#include "rows.h"

namespace slipstream {
const Kernels kAvx512Kernels = {
    .name = "avx512",
    .scratch_floats = avx512::scratch_floats,
    .attend = avx512::attend,
    .combine = avx512::combine,
    .rotate = avx512::rotate,
    .copy = avx512::copy,
    .add_and_normalise = avx512::add_and_normalise,
    .gate = avx512::gate,
    .likely = avx512::likely,
    .linear = avx512::linear,
};
}  // namespace slipstream
