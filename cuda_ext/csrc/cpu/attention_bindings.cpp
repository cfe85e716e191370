// Registers attention and its companions under the operators that cuda_ext/ops.py defines.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "dispatch.h"

#define SLIPSTREAM_ISA bindings
#include "convert.h"

namespace slipstream {
namespace {

using bindings::row_at;

Tensor block_attention(const Tensor& query, const Tensor& block_key, const Tensor& block_value, const Tensor& key_cache,
                       const Tensor& value_cache, const Tensor& block_tables, const Tensor& context_lens,
                       const Tensor& visible, double scale) {
  check_dim(query, "query", 4);
  const int64_t requests = query.size(0), queries = query.size(1), heads = query.size(2), head_dim = query.size(3);
  check_dim(block_key, "block_key", 4);
  const int64_t slots = block_key.size(1), kv_heads = block_key.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "query has ", heads, " heads, expected a multiple of the ",
                  kv_heads, " of block_key");
  check_head_dim(head_dim);
  check_shape(block_key, "block_key", {requests, slots, kv_heads, head_dim});
  check_shape(block_value, "block_value", {requests, slots, kv_heads, head_dim});
  check_shape(visible, "visible", {requests, queries});
  for (const auto& [tensor, name] : {std::pair(&block_key, "block_key"), std::pair(&block_value, "block_value"),
                                     std::pair(&key_cache, "key_cache"), std::pair(&value_cache, "value_cache")}) {
    check_same_dtype(*tensor, name, query, "query");
  }
  AttentionArgs args = paged_attention(key_cache, value_cache, block_tables, context_lens, {requests, kv_heads, head_dim});
  add_block(args, block_key, block_value, visible);
  Tensor output = torch::stable::new_empty(query, {requests, queries, heads, head_dim});
  args.query = rows_of(query, "query");
  args.output = rows_of(output, "output");
  args.group = heads / kv_heads;
  args.scale = float(scale);
  if (requests * queries > 0) {
    run_attention(args, block_spans(context_lens, queries), torch::stable::get_num_threads(), parallel_for);
  }
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
  check_slots(slot_mapping, pages * page_size);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slipstream, CPU, library) {
  library.impl("block_attention", TORCH_BOX(&block_attention));
  library.impl("partition_block", TORCH_BOX(&partition_block));
  library.impl("write_context", TORCH_BOX(&write_context));
}

}  // namespace slipstream
