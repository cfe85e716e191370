// The kernels compiled for one instruction set; the flags come from CMakeLists.txt.
#define SLIPSTREAM_ISA avx512

#include "block_attention.h"
#include "linear.h"
#include "rotary.h"

namespace slipstream {
const Kernels kAvx512Kernels = {
    "avx512", avx512::scratch_floats, avx512::attend, avx512::combine, avx512::rotate, avx512::copy, avx512::linear,
};
}  // namespace slipstream
