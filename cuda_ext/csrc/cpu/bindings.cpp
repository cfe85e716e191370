// Registers the CPU kernels under the operators that cuda_ext/ops.py defines, through torch's stable ABI.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "attention.h"
#include "blocks.h"
#include "dispatch.h"

#define SLIPSTREAM_ISA bindings
#include "convert.h"

namespace slipstream {
namespace {

using bindings::row_at;
using torch::stable::Tensor;

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

Rows rows_of(const Tensor& tensor, const char* name) {
  check_rows(tensor, name);
  return {tensor.data_ptr(), dtype_of<DType>(tensor, name), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Rows [tokens, heads, head_dim] as [1, tokens, heads, head_dim].
Rows token_rows(const Tensor& tensor, const char* name) {
  check_innermost(tensor, name);
  return {tensor.data_ptr(), dtype_of<DType>(tensor, name), 0, tensor.stride(0), tensor.stride(1)};
}

void check_pages(const Tensor& block_tables, const Tensor& context_lens, int64_t pages, int64_t page_size) {
  const int32_t* const table = static_cast<const int32_t*>(block_tables.const_data_ptr());
  const int32_t* const lengths = static_cast<const int32_t*>(context_lens.const_data_ptr());
  for (int64_t r = 0; r < context_lens.size(0); ++r) {
    const int64_t needed = (lengths[r] + page_size - 1) / page_size;
    STD_TORCH_CHECK(lengths[r] >= 0 && needed <= block_tables.size(1), "context_lens[", r, "] is ", lengths[r],
                    ", expected 0 to ", block_tables.size(1) * page_size, ", what block_tables has pages for");
    for (int64_t i = 0; i < needed; ++i) {
      const int32_t page = table[r * block_tables.stride(0) + i];
      STD_TORCH_CHECK(page >= 0 && page < pages, "block_tables[", r, ", ", i, "] is page ", page,
                      ", expected 0 to ", pages - 1, ", the pages of key_cache");
    }
  }
}

void check_visible(const Tensor& visible, int64_t slots) {
  const int32_t* const seen = static_cast<const int32_t*>(visible.const_data_ptr());
  for (int64_t i = 0; i < visible.numel(); ++i) {
    STD_TORCH_CHECK(seen[i] >= 0 && seen[i] <= slots, "visible is ", seen[i], " for query ", i % visible.size(1),
                    " of request ", i / visible.size(1), ", expected 0 to ", slots, ", the slots of block_key");
  }
}

Tensor block_attention(const Tensor& query, const Tensor& block_key, const Tensor& block_value, const Tensor& key_cache,
                       const Tensor& value_cache, const Tensor& block_tables, const Tensor& context_lens,
                       const Tensor& visible, double scale) {
  check_dim(query, "query", 4);
  const int64_t requests = query.size(0), queries = query.size(1), heads = query.size(2), head_dim = query.size(3);
  check_dim(block_key, "block_key", 4);
  check_dim(key_cache, "key_cache", 4);
  const int64_t slots = block_key.size(1), kv_heads = block_key.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "query has ", heads, " heads, expected a multiple of the ",
                  kv_heads, " of block_key");
  check_head_dim(head_dim);
  check_shape(block_key, "block_key", {requests, slots, kv_heads, head_dim});
  check_shape(block_value, "block_value", {requests, slots, kv_heads, head_dim});
  const int64_t pages = key_cache.size(0), page_size = key_cache.size(1);
  check_shape(key_cache, "key_cache", {pages, page_size, kv_heads, head_dim});
  check_shape(value_cache, "value_cache", {pages, page_size, kv_heads, head_dim});
  STD_TORCH_CHECK(page_size > 0, "key_cache has pages of ", page_size, " tokens, expected at least 1");
  check_dim(block_tables, "block_tables", 2);
  check_shape(block_tables, "block_tables", {requests, block_tables.size(1)});
  check_shape(context_lens, "context_lens", {requests});
  check_shape(visible, "visible", {requests, queries});
  check_index(block_tables, "block_tables", ScalarType::Int);
  check_index(context_lens, "context_lens", ScalarType::Int);
  check_index(visible, "visible", ScalarType::Int);
  for (const auto& [tensor, name] : {std::pair(&block_key, "block_key"), std::pair(&block_value, "block_value"),
                                     std::pair(&key_cache, "key_cache"), std::pair(&value_cache, "value_cache")}) {
    check_same_dtype(*tensor, name, query, "query");
  }
  check_pages(block_tables, context_lens, pages, page_size);
  check_visible(visible, slots);

  Tensor output = torch::stable::new_empty(query, {requests, queries, heads, head_dim});
  AttentionArgs args{};
  args.query = rows_of(query, "query");
  args.block_key = rows_of(block_key, "block_key");
  args.block_value = rows_of(block_value, "block_value");
  args.key_cache = rows_of(key_cache, "key_cache");
  args.value_cache = rows_of(value_cache, "value_cache");
  args.output = rows_of(output, "output");
  args.block_tables = static_cast<const int32_t*>(block_tables.const_data_ptr());
  args.block_table_stride = block_tables.size(0) ? block_tables.stride(0) : 0;
  args.context_lens = static_cast<const int32_t*>(context_lens.const_data_ptr());
  args.visible = static_cast<const int32_t*>(visible.const_data_ptr());
  args.queries = queries;
  args.slots = slots;
  args.kv_heads = kv_heads;
  args.group = heads / kv_heads;
  args.head_dim = head_dim;
  args.page_size = page_size;
  args.scale = float(scale);
  if (requests * queries > 0) run_block_attention(args, requests, torch::stable::get_num_threads(), parallel_for);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> partition_block(const Tensor& observed_at, const Tensor& first_positions) {
  check_dim(observed_at, "observed_at", 2);
  const int64_t requests = observed_at.size(0), slots = observed_at.size(1);
  check_shape(first_positions, "first_positions", {requests});
  check_index(observed_at, "observed_at", ScalarType::Int);
  check_index(first_positions, "first_positions", ScalarType::Long);
  Tensor order = torch::stable::new_empty(observed_at, {requests, slots}, ScalarType::Long);
  Tensor inverse = torch::stable::new_empty(observed_at, {requests, slots}, ScalarType::Long);
  Tensor positions = torch::stable::new_empty(observed_at, {requests, slots}, ScalarType::Long);
  Tensor visible = torch::stable::new_empty(observed_at, {requests, slots}, ScalarType::Int);
  const int32_t* const passes = static_cast<const int32_t*>(observed_at.const_data_ptr());
  const int64_t* const first = static_cast<const int64_t*>(first_positions.const_data_ptr());
  const auto data = [](const Tensor& tensor) { return static_cast<int64_t*>(tensor.data_ptr()); };
  for (int64_t r = 0; r < requests; ++r) {
    const int32_t* const pass = passes + r * slots;
    int64_t* const slot_at = data(order) + r * slots;
    // Insertion keeps equals in place, and a block has a handful of slots.
    for (int64_t slot = 0; slot < slots; ++slot) {
      int64_t place = slot;
      for (; place > 0 && pass[slot_at[place - 1]] > pass[slot]; --place) slot_at[place] = slot_at[place - 1];
      slot_at[place] = slot;
    }
    for (int64_t place = 0; place < slots; ++place) {
      data(inverse)[r * slots + slot_at[place]] = place;
      data(positions)[r * slots + place] = first[r] + slot_at[place];
      static_cast<int32_t*>(visible.data_ptr())[r * slots + place] = int32_t(place + 1);
    }
  }
  return {order, inverse, positions, visible};
}

RotaryArgs rotary_args(const std::optional<Tensor>& norm, const char* name, double eps, const Tensor& table,
                       int64_t head_dim) {
  check_head_dim(head_dim);
  STD_TORCH_CHECK(head_dim % 2 == 0, "head_dim is ", head_dim, ", expected an even number to rotate");
  check_dim(table, "rotary_table", 3);
  check_shape(table, "rotary_table", {table.size(0), 2, head_dim});
  check_index(table, "rotary_table", ScalarType::Float);
  if (norm) {
    check_shape(*norm, name, {head_dim});
    check_index(*norm, name, ScalarType::Float);
  }
  return {norm ? static_cast<const float*>(norm->const_data_ptr()) : nullptr, float(eps),
          static_cast<const float*>(table.const_data_ptr()), head_dim};
}

void check_positions(const Tensor& positions, const Tensor& table) {
  const int64_t* const data = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t i = 0; i < positions.numel(); ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < table.size(0), "positions has ", data[i], ", expected 0 to ",
                    table.size(0) - 1, ", what rotary_table covers");
  }
}

void write_context(const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_norm, double eps,
                   const Tensor& rotary_table, const Tensor& positions, const Tensor& slot_mapping,
                   const Tensor& key_cache, const Tensor& value_cache) {
  check_dim(key, "key", 3);
  check_dim(key_cache, "key_cache", 4);
  const int64_t tokens = key.size(0), kv_heads = key.size(1), head_dim = key.size(2);
  const int64_t pages = key_cache.size(0), page_size = key_cache.size(1);
  check_shape(value, "value", {tokens, kv_heads, head_dim});
  check_shape(key_cache, "key_cache", {pages, page_size, kv_heads, head_dim});
  check_shape(value_cache, "value_cache", {pages, page_size, kv_heads, head_dim});
  check_shape(positions, "positions", {tokens});
  check_shape(slot_mapping, "slot_mapping", {tokens});
  check_index(positions, "positions", ScalarType::Long);
  check_index(slot_mapping, "slot_mapping", ScalarType::Long);
  const RotaryArgs args = rotary_args(key_norm, "key_norm", eps, rotary_table, head_dim);
  check_positions(positions, rotary_table);
  const int64_t* const position = static_cast<const int64_t*>(positions.const_data_ptr());
  const int64_t* const slot = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(slot[t] < pages * page_size, "slot_mapping[", t, "] is ", slot[t], ", expected less than ",
                    pages * page_size, ", the slots of key_cache");
  }
  const Rows from_key = token_rows(key, "key"), from_value = token_rows(value, "value");
  const Rows to_key = rows_of(key_cache, "key_cache"), to_value = rows_of(value_cache, "value_cache");
  const Kernels& isa = kernels();
  constexpr int64_t kTokensPerThread = 64;
  parallel_for(tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slot[t] < 0) continue;
      const int64_t page = slot[t] / page_size, offset = slot[t] % page_size;
      for (int64_t h = 0; h < kv_heads; ++h) {
        isa.rotate(args, position[t], row_at(from_key, 0, t, h), from_key.dtype, row_at(to_key, page, offset, h),
                   to_key.dtype);
        isa.copy(row_at(from_value, 0, t, h), from_value.dtype, row_at(to_value, page, offset, h), to_value.dtype,
                 head_dim);
      }
    }
  });
}

Tensor append_block(const Tensor& qkv, const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm,
                    double eps, const Tensor& rotary_table, const Tensor& positions, const Tensor& places,
                    const Tensor& block_key, const Tensor& block_value) {
  check_dim(qkv, "qkv", 3);
  check_dim(block_key, "block_key", 4);
  const int64_t requests = qkv.size(0), queries = qkv.size(1);
  const int64_t slots = block_key.size(1), kv_heads = block_key.size(2), head_dim = block_key.size(3);
  check_head_dim(head_dim);
  const int64_t heads = qkv.size(2) / head_dim - 2 * kv_heads;
  STD_TORCH_CHECK(heads > 0 && qkv.size(2) % head_dim == 0, "qkv is ", qkv.size(2), " wide, expected head_dim ",
                  head_dim, " times the heads of queries and of ", kv_heads, " keys and values");
  check_innermost(qkv, "qkv");
  check_shape(block_key, "block_key", {requests, slots, kv_heads, head_dim});
  check_shape(block_value, "block_value", {requests, slots, kv_heads, head_dim});
  check_shape(positions, "positions", {requests, queries});
  check_shape(places, "places", {requests, queries});
  check_index(positions, "positions", ScalarType::Long);
  check_index(places, "places", ScalarType::Long);
  const RotaryArgs for_query = rotary_args(query_norm, "query_norm", eps, rotary_table, head_dim);
  const RotaryArgs for_key = rotary_args(key_norm, "key_norm", eps, rotary_table, head_dim);
  check_positions(positions, rotary_table);
  Tensor query = torch::stable::new_empty(qkv, {requests, queries, heads, head_dim});
  const DType dtype = dtype_of<DType>(qkv, "qkv");
  const Rows source{qkv.data_ptr(), dtype, qkv.stride(0), qkv.stride(1), head_dim};
  const Rows to_query = rows_of(query, "query");
  const Rows to_key = rows_of(block_key, "block_key"), to_value = rows_of(block_value, "block_value");
  const int64_t* const position = static_cast<const int64_t*>(positions.const_data_ptr());
  const int64_t* const place = static_cast<const int64_t*>(places.const_data_ptr());
  const Kernels& isa = kernels();
  for (int64_t i = 0; i < requests * queries; ++i) {
    STD_TORCH_CHECK(place[i] < slots, "places[", i / queries, ", ", i % queries, "] is ", place[i],
                    ", expected less than ", slots, ", the slots of block_key");
  }
  for (int64_t i = 0; i < requests * queries; ++i) {
    const int64_t r = i / queries, q = i % queries;
    for (int64_t h = 0; h < heads; ++h) {
      isa.rotate(for_query, position[i], row_at(source, r, q, h), dtype, row_at(to_query, r, q, h), dtype);
    }
    for (int64_t h = 0; place[i] >= 0 && h < kv_heads; ++h) {
      isa.rotate(for_key, position[i], row_at(source, r, q, heads + h), dtype, row_at(to_key, r, place[i], h),
                 to_key.dtype);
      isa.copy(row_at(source, r, q, heads + kv_heads + h), dtype, row_at(to_value, r, place[i], h), to_value.dtype,
               head_dim);
    }
  }
  return query;
}

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

Tensor linear(const Tensor& input, const Tensor& panels, const std::optional<Tensor>& scales, int64_t out,
              std::string name) {
  check_dim(input, "input", 2);
  check_dim(panels, "panels", 1);
  check_index(input, "input", ScalarType::Float);
  check_index(panels, "panels", ScalarType::Byte);
  const WeightFormat format = format_of(name);
  const int64_t rows = input.size(0), in = input.size(1), count = (out + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(in > 0, "input is 0 wide, expected at least 1");
  const bool blocked = format == WeightFormat::kQ8_0 || format == WeightFormat::kQ4_1;
  STD_TORCH_CHECK(!blocked || in % kBlock == 0, "input is ", in, " wide, expected a multiple of ", kBlock, " for ", name);
  const int64_t bytes = panel_block_bytes(format) * in / kBlock * count;
  STD_TORCH_CHECK(out > 0 && panels.numel() == bytes, "panels has ", panels.numel(), " bytes, expected ", bytes, " for ",
                  out, " outputs of ", in, " inputs in ", name);
  STD_TORCH_CHECK(scales.has_value() == (format == WeightFormat::kInt8), "scales is ",
                  scales ? "given" : "missing", ", expected only with int8 and always there");
  if (scales) {
    check_shape(*scales, "scales", {count * kPanel});
    check_index(*scales, "scales", ScalarType::Float);
  }
  Tensor output = torch::stable::new_empty(input, {rows, out});
  LinearArgs args{};
  args.input = static_cast<const float*>(input.const_data_ptr());
  args.input_stride = in;
  args.rows = rows;
  args.in = in;
  args.panels = panels.const_data_ptr();
  args.format = format;
  args.scales = scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  args.output = static_cast<float*>(output.data_ptr());
  args.output_stride = out;
  args.out = out;
  // Waking a thread has to be worth it.
  constexpr int64_t kWorkPerThread = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, in * kPanel * (1 + rows / 4)));
  if (rows > 0) parallel_for(count, grain, [&](int64_t begin, int64_t end) { kernels().linear(args, begin, end); });
  return output;
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
  library.impl("block_attention", TORCH_BOX(&block_attention));
  library.impl("partition_block", TORCH_BOX(&partition_block));
  library.impl("write_context", TORCH_BOX(&write_context));
  library.impl("append_block", TORCH_BOX(&append_block));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("find_blocks", TORCH_BOX(&find_blocks));
}

}  // namespace slipstream
