// Registers the walk through draft blocks. drafter/walk.py calls it and says what the arguments are; its definition is
// the beam search of drafter/path.py, which runs wherever there are no kernels.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "walk.h"

namespace slipstream {
namespace {

// An argument that is either empty or has all of its tensors.
bool given(const std::vector<Tensor>& tensors, const char* name, size_t count) {
  STD_TORCH_CHECK(tensors.empty() || tensors.size() == count, name, " has ", tensors.size(), " tensors, expected ", count,
                  " or none");
  return !tensors.empty();
}

template <class Element>
const Element* checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType type) {
  check_shape(tensor, name, shape);
  check_index(tensor, name, type);
  return data_of<Element>(tensor);
}

void add_context(WalkArgs& args, const std::vector<Tensor>& context) {
  if (!given(context, "context", 2)) return;
  args.before = checked<int64_t>(context[0], "before", {args.blocks}, ScalarType::Long);
  args.scopes = checked<int64_t>(context[1], "scopes", {args.blocks}, ScalarType::Long);
}

void add_vocabulary(WalkArgs& args, const std::vector<Tensor>& vocabulary) {
  if (!given(vocabulary, "vocabulary", 2)) return;
  args.token_ids = checked<int64_t>(vocabulary[0], "token_ids", {args.vocab}, ScalarType::Long);
  args.num_rows = vocabulary[1].numel();
  args.rows = checked<int64_t>(vocabulary[1], "rows", {args.num_rows}, ScalarType::Long);
  STD_TORCH_CHECK(args.num_rows > 0, "rows is empty, expected at least one");
}

void add_markov(WalkArgs& args, const std::vector<Tensor>& markov, const std::string& format) {
  if (!given(markov, "markov", 3)) return;
  const Tensor &previous = markov[0], &scales = markov[2];
  check_dim(previous, "previous", 2);
  check_index(previous, "previous", ScalarType::Float);
  args.previous = data_of<float>(previous);
  args.markov = weight_of(markov[1], scales.numel() ? std::optional(scales) : std::nullopt, format, previous.size(1),
                          args.vocab, "previous");
  args.target_vocab = std::min(args.target_vocab, previous.size(0));
}

void add_ngrams(WalkArgs& args, const std::vector<Tensor>& ngrams, double text) {
  if (!given(ngrams, "ngrams", 4)) return;
  check_dim(ngrams[0], "cells", 2);
  NgramArgs& a = args.ngrams;
  a.buckets = ngrams[0].size(0);
  STD_TORCH_CHECK(a.buckets > 0 && (a.buckets & (a.buckets - 1)) == 0, "cells has ", a.buckets,
                  " buckets, expected a power of two");
  a.cells = reinterpret_cast<const uint64_t*>(
      checked<int64_t>(ngrams[0], "cells", {a.buckets, kWays}, ScalarType::Long));
  a.values = checked<int32_t>(ngrams[1], "values", {a.buckets, kWays}, ScalarType::Int);
  a.unigrams = checked<int32_t>(ngrams[2], "unigrams", {ngrams[2].numel()}, ScalarType::Int);
  a.concentrations = checked<float>(ngrams[3], "concentrations", {kLevels}, ScalarType::Float);
  a.text = float(text);
  args.target_vocab = std::min(args.target_vocab, ngrams[2].numel());
}

void add_draws(WalkArgs& args, const std::vector<Tensor>& draws) {
  if (!given(draws, "draws", 4)) return;
  args.draws.seeds = checked<int64_t>(draws[0], "seeds", {args.blocks}, ScalarType::Long);
  args.draws.positions = checked<int64_t>(draws[1], "positions", {args.blocks}, ScalarType::Long);
  args.draws.temperatures = checked<double>(draws[2], "temperatures", {args.blocks}, ScalarType::Double);
  args.draws.shares = checked<double>(draws[3], "shares", {args.blocks}, ScalarType::Double);
}

std::tuple<Tensor, Tensor> walk_block(const Tensor& logits, const Tensor& anchors, std::vector<Tensor> context,
                                      const Tensor& ends, std::vector<Tensor> vocabulary, std::vector<Tensor> markov,
                                      std::string format, std::vector<Tensor> ngrams, double text,
                                      std::vector<Tensor> draws, int64_t count, double mass) {
  check_dim(logits, "logits", 3);
  check_index(logits, "logits", ScalarType::Float);
  WalkArgs args{};
  args.blocks = logits.size(0);
  args.slots = logits.size(1);
  args.vocab = logits.size(2);
  args.logits = data_of<float>(logits);
  args.target_vocab = std::numeric_limits<int64_t>::max();
  STD_TORCH_CHECK(count > 0 && count <= args.vocab, "count is ", count, ", expected 1 to ", args.vocab,
                  ", the width of logits");
  args.count = count;
  args.mass = float(mass);
  args.anchors = checked<int64_t>(anchors, "anchors", {args.blocks}, ScalarType::Long);
  check_dim(ends, "ends", 2);
  args.num_ends = ends.size(1);
  args.ends = checked<int64_t>(ends, "ends", {args.blocks, args.num_ends}, ScalarType::Long);
  add_context(args, context);
  add_vocabulary(args, vocabulary);
  add_markov(args, markov, format);
  add_ngrams(args, ngrams, text);
  add_draws(args, draws);
  for (int64_t b = 0; b < args.blocks; ++b) {
    STD_TORCH_CHECK(!args.previous || (args.anchors[b] >= 0 && args.anchors[b] < args.target_vocab), "anchors[", b,
                    "] is ", args.anchors[b], ", expected 0 to ", args.target_vocab - 1);
  }
  Tensor tokens = torch::stable::new_empty(logits, {args.blocks, args.slots}, ScalarType::Long);
  Tensor probabilities = torch::stable::new_empty(logits, {args.blocks, args.slots});
  args.tokens = static_cast<int64_t*>(tokens.data_ptr());
  args.probabilities = static_cast<float*>(probabilities.data_ptr());
  const std::optional<int64_t> unknown = walk_blocks(args, parallel_for);
  STD_TORCH_CHECK(!unknown, "a candidate is token ", *unknown, ", expected 0 to ", args.target_vocab - 1);
  return {tokens, probabilities};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slipstream, library) {
  library.def(
      "walk_block(Tensor logits, Tensor anchors, Tensor[] context, Tensor ends, Tensor[] vocabulary, Tensor[] markov, "
      "str format, Tensor[] ngrams, float text, Tensor[] draws, int count, float mass) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(slipstream, CPU, library) { library.impl("walk_block", TORCH_BOX(&walk_block)); }

}  // namespace slipstream
