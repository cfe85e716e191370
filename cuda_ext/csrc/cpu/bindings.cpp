// Registers what has to do with neither attention nor layers: likely tokens, weights' blocks, instruction sets. Through
// torch's stable ABI, like all operators.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "blocks.h"
#include "dispatch.h"

namespace slipstream {
namespace {

std::tuple<Tensor, Tensor, Tensor> likely_tokens(const Tensor& logits, const std::optional<Tensor>& bias, int64_t count) {
  check_dim(logits, "logits", 2);
  check_index(logits, "logits", ScalarType::Float);
  const int64_t blocks = logits.size(0), vocab = logits.size(1);
  if (bias) {
    check_dim(*bias, "bias", 3);
    check_shape(*bias, "bias", {blocks, bias->size(1), vocab});
    check_index(*bias, "bias", ScalarType::Float);
  }
  STD_TORCH_CHECK(count > 0 && count <= vocab, "count is ", count, ", expected 1 to ", vocab, ", the width of logits");
  const int64_t rows = bias ? bias->size(1) : 1;
  Tensor probabilities = torch::stable::new_empty(logits, {blocks, rows, count});
  Tensor tokens = torch::stable::new_empty(logits, {blocks, rows, count}, ScalarType::Long);
  Tensor log_sums = torch::stable::new_empty(logits, {blocks, rows});
  const Kernels& isa = kernels();
  parallel_for(blocks * rows, 4, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;
    if (scratch.size() < size_t(vocab)) scratch.resize(size_t(vocab));
    for (int64_t i = begin; i < end; ++i) {
      LikelyArgs args{};
      args.logits = data_of<float>(logits) + i / rows * vocab;
      args.bias = bias ? data_of<float>(*bias) + i * vocab : nullptr;
      args.vocab = vocab;
      args.count = count;
      args.probabilities = static_cast<float*>(probabilities.data_ptr()) + i * count;
      args.tokens = static_cast<int64_t*>(tokens.data_ptr()) + i * count;
      args.log_sum = static_cast<float*>(log_sums.data_ptr()) + i;
      isa.likely(args, scratch.data());
    }
  });
  return {probabilities, tokens, log_sums};
}

// The blocks [out, in / 32 * bytes] that `weight` was widened from; nothing, [0, 0], if there are none.
Tensor find_blocks(const Tensor& weight, std::string name) {
  check_dim(weight, "weight", 2);
  check_index(weight, "weight", ScalarType::Float);
  STD_TORCH_CHECK(name == "q8_0" || name == "q4_1", "format is ", name, ", expected q8_0 or q4_1");
  const bool q8 = name == "q8_0";
  const int64_t rows = weight.size(0), blocks = weight.size(1) / kBlock, size = q8 ? kQ8_0Bytes : kQ4_1Bytes;
  const Tensor nothing = torch::stable::new_empty(weight, {0, 0}, ScalarType::Byte);
  if (weight.size(1) % kBlock) return nothing;
  Tensor found = torch::stable::new_empty(weight, {rows, blocks * size}, ScalarType::Byte);
  const float* const from = static_cast<const float*>(weight.const_data_ptr());
  uint8_t* const to = static_cast<uint8_t*>(found.data_ptr());
  std::atomic<bool> exact{true};
  parallel_for(rows * blocks, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && exact.load(std::memory_order_relaxed); ++i) {
      if (!(q8 ? find_q8_0 : find_q4_1)(from + i * kBlock, to + i * size)) exact.store(false);
    }
  });
  return exact ? found : nothing;
}

std::string cpu_isa() { return kernels().name; }

void force_cpu_isa(std::string name) {
  STD_TORCH_CHECK(force_isa(name), "instruction set is ", name, ", expected one of ", supported_isas(), " or nothing");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slipstream, library) {
  library.def("find_blocks(Tensor weight, str format) -> Tensor");
  library.def("cpu_isa() -> str");
  library.def("supported_cpu_isas() -> str");
  library.def("force_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slipstream, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("supported_cpu_isas", TORCH_BOX(&supported_isas));
  library.impl("force_cpu_isa", TORCH_BOX(&force_cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(slipstream, CPU, library) {
  library.impl("likely_tokens", TORCH_BOX(&likely_tokens));
  library.impl("find_blocks", TORCH_BOX(&find_blocks));
}

}  // namespace slipstream
