// The kernels compiled for one instruction set; the flags come from CMakeLists.txt.
#define SLIPSTREAM_ISA avx2

#include "block_attention.h"
#include "linear.h"
#include "rotary.h"

namespace slipstream {
const Kernels kAvx2Kernels = {
    "avx2", avx2::scratch_floats, avx2::attend, avx2::combine, avx2::rotate, avx2::copy, avx2::linear,
};
}  // namespace slipstream
