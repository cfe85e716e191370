// What the operators' bindings share: kernels' views of tensors, and checks of what they hold.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/checks.h"
#include "args.h"
#include "linear_call.h"
#include "parallel.h"

namespace slipstream {

using torch::stable::Tensor;

inline void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

template <class Element>
const Element* data_of(const Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}

inline Rows rows_of(const Tensor& tensor, const char* name) {
  check_rows(tensor, name);
  return {tensor.data_ptr(), dtype_of<DType>(tensor, name), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Rows [tokens, heads, head_dim] as [1, tokens, heads, head_dim].
inline Rows token_rows(const Tensor& tensor, const char* name) {
  check_innermost(tensor, name);
  return {tensor.data_ptr(), dtype_of<DType>(tensor, name), 0, tensor.stride(0), tensor.stride(1)};
}

inline void check_pages(const Tensor& block_tables, const Tensor& context_lens, int64_t pages, int64_t page_size) {
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

inline void check_visible(const Tensor& visible, int64_t slots) {
  const int32_t* const seen = static_cast<const int32_t*>(visible.const_data_ptr());
  for (int64_t i = 0; i < visible.numel(); ++i) {
    STD_TORCH_CHECK(seen[i] >= 0 && seen[i] <= slots, "visible is ", seen[i], " for query ", i % visible.size(1),
                    " of request ", i / visible.size(1), ", expected 0 to ", slots, ", the slots of block_key");
  }
}

struct AttentionShape {
  int64_t requests, kv_heads, head_dim;
};

// Attention over pages, without what is particular to its queries.
inline AttentionArgs paged_attention(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                                     const Tensor& context_lens, const AttentionShape& shape) {
  check_dim(key_cache, "key_cache", 4);
  const int64_t pages = key_cache.size(0), page_size = key_cache.size(1);
  check_shape(key_cache, "key_cache", {pages, page_size, shape.kv_heads, shape.head_dim});
  check_shape(value_cache, "value_cache", {pages, page_size, shape.kv_heads, shape.head_dim});
  check_same_dtype(value_cache, "value_cache", key_cache, "key_cache");
  STD_TORCH_CHECK(page_size > 0, "key_cache has pages of ", page_size, " tokens, expected at least 1");
  check_dim(block_tables, "block_tables", 2);
  check_shape(block_tables, "block_tables", {shape.requests, block_tables.size(1)});
  check_shape(context_lens, "context_lens", {shape.requests});
  check_index(block_tables, "block_tables", ScalarType::Int);
  check_index(context_lens, "context_lens", ScalarType::Int);
  check_pages(block_tables, context_lens, pages, page_size);
  AttentionArgs args{};
  args.key_cache = rows_of(key_cache, "key_cache");
  args.value_cache = rows_of(value_cache, "value_cache");
  args.block_tables = data_of<int32_t>(block_tables);
  args.block_table_stride = shape.requests ? block_tables.stride(0) : 0;
  args.kv_heads = shape.kv_heads;
  args.head_dim = shape.head_dim;
  args.page_size = page_size;
  return args;
}

// Draft slots [requests, slots, kv_heads, head_dim] beside the pages, of which query q of request r sees visible[r, q].
inline void add_block(AttentionArgs& args, const Tensor& block_key, const Tensor& block_value, const Tensor& visible) {
  check_index(visible, "visible", ScalarType::Int);
  args.slots = block_key.size(1);
  args.queries = visible.size(1);
  check_visible(visible, args.slots);
  args.block_key = rows_of(block_key, "block_key");
  args.block_value = rows_of(block_value, "block_value");
  args.visible = data_of<int32_t>(visible);
}

inline std::vector<QuerySpan> block_spans(const Tensor& context_lens, int64_t queries) {
  std::vector<QuerySpan> spans;
  const int32_t* const lengths = data_of<int32_t>(context_lens);
  for (int64_t r = 0; r < context_lens.numel(); ++r) spans.push_back({r, 0, queries, lengths[r]});
  return spans;
}

inline RotaryArgs rotary_args(const std::optional<Tensor>& norm, const char* name, double eps, const Tensor& table,
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

inline void check_positions(const Tensor& positions, const Tensor& table) {
  const int64_t* const data = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t i = 0; i < positions.numel(); ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < table.size(0), "positions has ", data[i], ", expected 0 to ",
                    table.size(0) - 1, ", what rotary_table covers");
  }
}

inline void check_slots(const Tensor& slot_mapping, int64_t slots) {
  const int64_t* const slot = data_of<int64_t>(slot_mapping);
  for (int64_t t = 0; t < slot_mapping.numel(); ++t) {
    STD_TORCH_CHECK(slot[t] < slots, "slot_mapping[", t, "] is ", slot[t], ", expected less than ", slots,
                    ", the slots of key_cache");
  }
}

// A packed weight of cuda_ext/linear.py; messages call its inputs the width of `input`.
LayerWeight weight_of(const Tensor& panels, const std::optional<Tensor>& scales, const std::string& format, int64_t in,
                      int64_t out, const char* input);

}  // namespace slipstream
