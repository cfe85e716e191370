#include "linear_call.h"

#include <algorithm>

#include "dispatch.h"

namespace slipstream {
namespace {

LinearArgs arguments(const LayerWeight& weight, const float* input, int64_t rows, float* output) {
  LinearArgs args{};
  args.input = input;
  args.input_stride = weight.in;
  args.rows = rows;
  args.in = weight.in;
  args.panels = weight.panels;
  args.format = weight.format;
  args.scales = weight.scales;
  args.output = output;
  args.output_stride = weight.out;
  args.out = weight.out;
  return args;
}

// Panels that are worth waking a thread for.
int64_t panels_per_thread(const LinearArgs& args) {
  constexpr int64_t kWorkPerThread = 1 << 16;
  return std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, args.in * kPanel * (1 + args.rows / 4)));
}

}  // namespace

void run_linear(const LayerWeight& weight, const float* input, int64_t rows, float* output,
                const ParallelFor& parallel_for) {
  const LinearArgs args = arguments(weight, input, rows, output);
  const int64_t panels = (weight.out + kPanel - 1) / kPanel;
  if (rows == 0) return;
  parallel_for(panels, panels_per_thread(args), [&](int64_t begin, int64_t end) { kernels().linear(args, begin, end); });
}

void run_gated_linear(const LayerWeight& weight, const float* input, int64_t rows, float* projected, float* output,
                      const ParallelFor& parallel_for) {
  const LinearArgs args = arguments(weight, input, rows, projected);
  const int64_t half = weight.out / 2, panels = half / kPanel;
  if (rows == 0) return;
  parallel_for(panels, panels_per_thread(args), [&](int64_t begin, int64_t end) {
    const Kernels& isa = kernels();
    isa.linear(args, begin, end);
    isa.linear(args, panels + begin, panels + end);
    const int64_t first = begin * kPanel, count = (end - begin) * kPanel;
    for (int64_t r = 0; r < rows; ++r) {
      isa.gate(projected + r * weight.out + first, projected + r * weight.out + half + first, output + r * half + first,
               count);
    }
  });
}

}  // namespace slipstream
