// Splitting a linear layer's outputs among threads.
#pragma once

#include "args.h"
#include "parallel.h"

namespace slipstream {

// A packed weight: `out` outputs of `in` inputs.
struct LayerWeight {
  const void* panels;
  WeightFormat format;
  const float* scales;  // kInt8 only
  int64_t in, out;
};

// output[r] = weight * input[r] for rows of `weight.in` and `weight.out` floats without gaps.
void run_linear(const LayerWeight& weight, const float* input, int64_t rows, float* output, const ParallelFor& parallel_for);

// output[r] = silu(gate) * up, where gate and up are the first and the second half of weight * input[r]. Halves must be
// whole panels. `projected` has room for rows of `weight.out` floats.
void run_gated_linear(const LayerWeight& weight, const float* input, int64_t rows, float* projected, float* output,
                      const ParallelFor& parallel_for);

}  // namespace slipstream
