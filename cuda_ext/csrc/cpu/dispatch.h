// The choice of an instruction set at run time.
#pragma once

#include <string>

#include "args.h"

namespace slipstream {

// The kernels in use: the best that this processor runs, unless another was asked for.
const Kernels& kernels();

// The sets that this processor runs, best first, separated by commas.
std::string supported_isas();

// Use the named set, or the best one again for an empty name; returns whether this processor runs it.
bool force_isa(const std::string& name);

}  // namespace slipstream
