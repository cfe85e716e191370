// Registers linear layers and decoder layers under the operators that cuda_ext/ops.py defines.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "layer.h"

namespace slipstream {
namespace {

WeightFormat format_of(const std::string& name) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8", "q8_0", "q4_1"};
  for (int32_t i = 0; i < 6; ++i) {
    if (name == kNames[i]) return WeightFormat(i);
  }
  STD_TORCH_CHECK(false, "format is ", name, ", expected float32, bfloat16, float16, int8, q8_0 or q4_1");
}

// Bytes of kBlock inputs of one panel.
int64_t panel_block_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32: return kPanel * kBlock * 4;
    case WeightFormat::kInt8: return kPanel * kBlock;
    case WeightFormat::kQ8_0: return kPanel * (kBlock + 2);
    case WeightFormat::kQ4_1: return kPanel * (kBlock / 2 + 4);
    default: return kPanel * kBlock * 2;
  }
}

}  // namespace

LayerWeight weight_of(const Tensor& panels, const std::optional<Tensor>& scales, const std::string& name, int64_t in,
                      int64_t out, const char* input) {
  check_dim(panels, "panels", 1);
  check_index(panels, "panels", ScalarType::Byte);
  const WeightFormat format = format_of(name);
  const int64_t count = (out + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(in > 0, input, " is 0 wide, expected at least 1");
  const bool blocked = format == WeightFormat::kQ8_0 || format == WeightFormat::kQ4_1;
  STD_TORCH_CHECK(!blocked || in % kBlock == 0, input, " is ", in, " wide, expected a multiple of ", kBlock, " for ", name);
  const int64_t bytes = panel_block_bytes(format) * in / kBlock * count;
  STD_TORCH_CHECK(out > 0 && panels.numel() == bytes, "panels has ", panels.numel(), " bytes, expected ", bytes, " for ",
                  out, " outputs of ", in, " inputs in ", name);
  STD_TORCH_CHECK(scales.has_value() == (format == WeightFormat::kInt8), "scales is ",
                  scales ? "given" : "missing", ", expected only with int8 and always there");
  if (scales) {
    check_shape(*scales, "scales", {count * kPanel});
    check_index(*scales, "scales", ScalarType::Float);
  }
  return {panels.const_data_ptr(), format, scales ? data_of<float>(*scales) : nullptr, in, out};
}

namespace {

Tensor linear(const Tensor& input, const Tensor& panels, const std::optional<Tensor>& scales, int64_t out,
              std::string format) {
  check_dim(input, "input", 2);
  check_index(input, "input", ScalarType::Float);
  const LayerWeight weight = weight_of(panels, scales, format, input.size(1), out, "input");
  Tensor output = torch::stable::new_empty(input, {input.size(0), out});
  run_linear(weight, data_of<float>(input), input.size(0), static_cast<float*>(output.data_ptr()), parallel_for);
  return output;
}

// The weights of a decoder layer as the operators are given them, see cuda_ext/decoder.py.
struct LayerTensors {
  const Tensor &input_norm, &post_norm;
  double eps;
  const std::vector<Tensor>&panels, &scales;
  const std::vector<std::string>& formats;
  int64_t heads, intermediate;
  const std::optional<Tensor>&qkv_bias, &query_norm, &key_norm;
};

void check_vector(const Tensor& tensor, const char* name, int64_t size) {
  check_shape(tensor, name, {size});
  check_index(tensor, name, ScalarType::Float);
}

// Rows [..., hidden] of a layer whose keys have `kv_heads` heads of `head_dim`.
LayerArgs layer_args(const LayerTensors& given, const Tensor& hidden, const std::optional<Tensor>& residual,
                     const Tensor& positions, const Tensor& rotary_table, int64_t kv_heads, int64_t head_dim) {
  check_head_dim(head_dim);
  check_index(hidden, "hidden", ScalarType::Float);
  const int64_t width = given.input_norm.numel(), tokens = hidden.numel() / std::max<int64_t>(width, 1);
  const int64_t heads = given.heads;
  STD_TORCH_CHECK(hidden.size(hidden.dim() - 1) == width, "hidden is ", hidden.size(hidden.dim() - 1),
                  " wide, expected the ", width, " of input_norm");
  if (residual) {
    STD_TORCH_CHECK(residual->sizes() == hidden.sizes(), "residual has shape ", shape_text(residual->sizes()),
                    ", expected that of hidden, ", shape_text(hidden.sizes()));
    check_index(*residual, "residual", ScalarType::Float);
  }
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads is ", heads,
                  ", expected a multiple of the ", kv_heads, " of key_cache");
  STD_TORCH_CHECK(given.intermediate > 0 && given.intermediate % kPanel == 0, "intermediate is ", given.intermediate,
                  ", expected a multiple of ", kPanel);
  check_vector(given.input_norm, "input_norm", width);
  check_vector(given.post_norm, "post_norm", width);
  if (given.qkv_bias) check_vector(*given.qkv_bias, "qkv_bias", (heads + 2 * kv_heads) * head_dim);
  check_index(positions, "positions", ScalarType::Long);
  STD_TORCH_CHECK(positions.numel() == tokens, "positions has ", positions.numel(), " elements, expected ", tokens);
  STD_TORCH_CHECK(given.panels.size() == 4 && given.scales.size() == 4 && given.formats.size() == 4,
                  "panels, scales and formats have ", given.panels.size(), ", ", given.scales.size(), " and ",
                  given.formats.size(), " entries, expected 4 each");
  const auto weight = [&](size_t i, int64_t in, int64_t out, const char* input) {
    const std::optional<Tensor> scales = given.scales[i].numel() ? std::optional(given.scales[i]) : std::nullopt;
    return weight_of(given.panels[i], scales, given.formats[i], in, out, input);
  };
  LayerArgs args{};
  args.tokens = tokens;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = head_dim;
  args.input_norm = {data_of<float>(given.input_norm), float(given.eps), width};
  args.post_norm = {data_of<float>(given.post_norm), float(given.eps), width};
  args.qkv_bias = given.qkv_bias ? data_of<float>(*given.qkv_bias) : nullptr;
  args.query_rotary = rotary_args(given.query_norm, "query_norm", given.eps, rotary_table, head_dim);
  args.key_rotary = rotary_args(given.key_norm, "key_norm", given.eps, rotary_table, head_dim);
  check_positions(positions, rotary_table);
  args.positions = data_of<int64_t>(positions);
  args.qkv = weight(0, width, args.qkv_width(), "hidden");
  args.output = weight(1, heads * head_dim, width, "attention's output");
  args.gate_up = weight(2, width, 2 * given.intermediate, "hidden");
  args.down = weight(3, given.intermediate, width, "intermediate");
  return args;
}

// Rows of one span see many keys in common; more of them would outgrow the cache.
constexpr int64_t kRowsPerSpan = 48;

std::vector<QuerySpan> causal_spans(const Tensor& query_starts, const Tensor& context_lens, int64_t tokens,
                                    int64_t group) {
  const int64_t most = std::max<int64_t>(1, kRowsPerSpan / group);
  const int32_t* const starts = data_of<int32_t>(query_starts);
  const int32_t* const lengths = data_of<int32_t>(context_lens);
  std::vector<QuerySpan> spans;
  for (int64_t r = 0; r < context_lens.size(0); ++r) {
    STD_TORCH_CHECK(starts[r] >= 0 && starts[r] <= starts[r + 1] && starts[r + 1] <= tokens, "query_starts[", r + 1,
                    "] is ", starts[r + 1], " after ", starts[r], ", expected rising numbers from 0 to ", tokens);
    const int64_t queries = starts[r + 1] - starts[r];
    STD_TORCH_CHECK(lengths[r] >= queries, "context_lens[", r, "] is ", lengths[r], ", expected at least the ", queries,
                    " queries of the request");
    for (int64_t q = 0; q < queries; q += most) {
      const int64_t count = std::min(most, queries - q);
      spans.push_back({r, starts[r] + q, count, lengths[r] - queries + q + count});
    }
  }
  return spans;
}

std::tuple<Tensor, Tensor> run(const LayerArgs& layer, const Tensor& hidden, const std::optional<Tensor>& residual,
                               const Rows& key, const Rows& value, const PlaceOf& place_of, const Attend& attend) {
  Tensor output = torch::stable::empty_like(hidden), new_residual = torch::stable::empty_like(hidden);
  run_layer(layer, data_of<float>(hidden), residual ? data_of<float>(*residual) : nullptr, key, value, place_of, attend,
            static_cast<float*>(new_residual.data_ptr()), static_cast<float*>(output.data_ptr()), parallel_for);
  return {output, new_residual};
}

std::tuple<Tensor, Tensor> decoder_layer(
    const Tensor& hidden, const std::optional<Tensor>& residual, const Tensor& positions, const Tensor& key_cache,
    const Tensor& value_cache, const Tensor& slot_mapping, const Tensor& block_tables, const Tensor& context_lens,
    const Tensor& query_starts, const Tensor& rotary_table, double scale, const Tensor& input_norm,
    const Tensor& post_norm, double eps, std::vector<Tensor> panels, std::vector<Tensor> scales,
    std::vector<std::string> formats, int64_t heads, int64_t intermediate, const std::optional<Tensor>& qkv_bias,
    const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm) {
  check_dim(hidden, "hidden", 2);
  check_dim(key_cache, "key_cache", 4);
  const int64_t kv_heads = key_cache.size(2), head_dim = key_cache.size(3);
  const LayerArgs layer = layer_args(
      {input_norm, post_norm, eps, panels, scales, formats, heads, intermediate, qkv_bias, query_norm, key_norm}, hidden,
      residual, positions, rotary_table, kv_heads, head_dim);
  const int64_t tokens = layer.tokens, requests = context_lens.size(0);
  check_shape(slot_mapping, "slot_mapping", {tokens});
  check_index(slot_mapping, "slot_mapping", ScalarType::Long);
  check_shape(query_starts, "query_starts", {requests + 1});
  check_index(query_starts, "query_starts", ScalarType::Int);
  AttentionArgs attention =
      paged_attention(key_cache, value_cache, block_tables, context_lens, {requests, kv_heads, head_dim});
  check_slots(slot_mapping, key_cache.size(0) * attention.page_size);
  attention.group = heads / kv_heads;
  attention.scale = float(scale);
  attention.causal = true;
  const std::vector<QuerySpan> spans = causal_spans(query_starts, context_lens, tokens, attention.group);
  for (const QuerySpan& span : spans) attention.queries = std::max(attention.queries, span.queries);
  const int64_t* const slots = data_of<int64_t>(slot_mapping);
  const int64_t served = requests ? data_of<int32_t>(query_starts)[requests] : 0;
  const PlaceOf place_of = [&](int64_t token, Place* place) {
    *place = {slots[token] / attention.page_size, slots[token] % attention.page_size};
    return slots[token] >= 0;
  };
  const Attend attend = [&](const Rows& query, const Rows& output) {
    attention.query = query;
    attention.output = output;
    // Rows behind those of the requests are padding.
    float* const padding = static_cast<float*>(output.data) + served * output.middle;
    std::fill(padding, padding + (tokens - served) * output.middle, 0.0f);
    run_attention(attention, spans, torch::stable::get_num_threads(), parallel_for);
  };
  return run(layer, hidden, residual, attention.key_cache, attention.value_cache, place_of, attend);
}

std::tuple<Tensor, Tensor> draft_layer(
    const Tensor& hidden, const std::optional<Tensor>& residual, const Tensor& positions, const Tensor& places,
    const Tensor& visible, const Tensor& block_key, const Tensor& block_value, const Tensor& key_cache,
    const Tensor& value_cache, const Tensor& block_tables, const Tensor& context_lens, const Tensor& rotary_table,
    double scale, const Tensor& input_norm, const Tensor& post_norm, double eps, std::vector<Tensor> panels,
    std::vector<Tensor> scales, std::vector<std::string> formats, int64_t heads, int64_t intermediate,
    const std::optional<Tensor>& qkv_bias, const std::optional<Tensor>& query_norm,
    const std::optional<Tensor>& key_norm) {
  check_dim(hidden, "hidden", 3);
  check_dim(block_key, "block_key", 4);
  const int64_t requests = hidden.size(0), queries = hidden.size(1), slots = block_key.size(1);
  const int64_t kv_heads = block_key.size(2), head_dim = block_key.size(3);
  const LayerArgs layer = layer_args(
      {input_norm, post_norm, eps, panels, scales, formats, heads, intermediate, qkv_bias, query_norm, key_norm}, hidden,
      residual, positions, rotary_table, kv_heads, head_dim);
  check_shape(block_key, "block_key", {requests, slots, kv_heads, head_dim});
  check_shape(block_value, "block_value", {requests, slots, kv_heads, head_dim});
  check_same_dtype(block_value, "block_value", block_key, "block_key");
  check_same_dtype(key_cache, "key_cache", block_key, "block_key");
  for (const auto& [tensor, name] :
       {std::pair(&positions, "positions"), std::pair(&places, "places"), std::pair(&visible, "visible")}) {
    check_shape(*tensor, name, {requests, queries});
  }
  check_index(places, "places", ScalarType::Long);
  const int64_t* const place = data_of<int64_t>(places);
  for (int64_t i = 0; i < requests * queries; ++i) {
    STD_TORCH_CHECK(place[i] < slots, "places[", i / queries, ", ", i % queries, "] is ", place[i],
                    ", expected less than ", slots, ", the slots of block_key");
  }
  AttentionArgs attention =
      paged_attention(key_cache, value_cache, block_tables, context_lens, {requests, kv_heads, head_dim});
  add_block(attention, block_key, block_value, visible);
  attention.group = heads / kv_heads;
  attention.scale = float(scale);
  const PlaceOf place_of = [&](int64_t row, Place* at) {
    *at = {row / queries, place[row]};
    return place[row] >= 0;
  };
  const Attend attend = [&](const Rows& query, const Rows& output) {
    attention.query = query;
    attention.output = output;
    attention.query.outer = queries * query.middle;
    attention.output.outer = queries * output.middle;
    run_attention(attention, block_spans(context_lens, queries), torch::stable::get_num_threads(), parallel_for);
  };
  return run(layer, hidden, residual, attention.block_key, attention.block_value, place_of, attend);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slipstream, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("decoder_layer", TORCH_BOX(&decoder_layer));
  library.impl("draft_layer", TORCH_BOX(&draft_layer));
}

}  // namespace slipstream
