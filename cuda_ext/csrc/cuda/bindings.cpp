// Registers the CUDA kernels under the operators that cuda_ext/ops.py defines, through torch's stable ABI: nothing here
// needs the headers or libraries of a torch built for CUDA. Like the kernels, it has never run on a GPU.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

#include "../common/checks.h"
#include "block_attention.h"
#include "launch_plan.h"

namespace slipstream {
namespace cuda {
namespace {

constexpr int64_t kAlignment = 16;  // bytes; rows are copied in pieces of this size

void check_device(const Tensor& tensor, const char* name, const Tensor& query) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " is not on a CUDA device, expected all tensors on one");
  STD_TORCH_CHECK(tensor.get_device_index() == query.get_device_index(), name, " is on CUDA device ",
                  tensor.get_device_index(), ", expected ", query.get_device_index(), " as query");
}

Rows rows_of(const Tensor& tensor, const char* name) {
  check_rows(tensor, name);
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  STD_TORCH_CHECK(address % kAlignment == 0, name, " starts ", address % kAlignment,
                  " bytes behind a multiple of 16, expected a multiple of 16");
  for (int64_t axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(tensor.size(axis) <= 1 || tensor.stride(axis) * size % kAlignment == 0, name, " has stride ",
                    tensor.stride(axis), " in dimension ", axis, ", expected a multiple of ", kAlignment / size,
                    " elements, which is 16 bytes");
  }
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Sizes are 32 bits wide in the kernels.
int32_t narrow(int64_t size, const char* what) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), what, " is ", size, ", expected less than 2^31");
  return static_cast<int32_t>(size);
}

const int32_t* indices_of(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.const_data_ptr()); }

struct Arguments {
  const Tensor &query, &block_key, &block_value, &key_cache, &value_cache, &block_tables, &context_lens, &visible;

  int64_t requests() const { return query.size(0); }
  int64_t queries() const { return query.size(1); }
  int64_t heads() const { return query.size(2); }
  int64_t head_dim() const { return query.size(3); }
  int64_t slots() const { return block_key.size(1); }
  int64_t kv_heads() const { return block_key.size(2); }
  int64_t page_size() const { return key_cache.size(1); }
  int64_t max_pages() const { return block_tables.size(1); }
};

void check_head_dims(int64_t head_dim) {
#define SLIPSTREAM_IS(dim) || head_dim == dim
#define SLIPSTREAM_TEXT(dim) " " #dim
  STD_TORCH_CHECK(false SLIPSTREAM_HEAD_DIMS(SLIPSTREAM_IS), "head_dim is ", head_dim,
                  ", expected one of" SLIPSTREAM_HEAD_DIMS(SLIPSTREAM_TEXT));
#undef SLIPSTREAM_IS
#undef SLIPSTREAM_TEXT
}

void check_shapes(const Arguments& a) {
  check_dim(a.query, "query", 4);
  check_dim(a.block_key, "block_key", 4);
  check_dim(a.key_cache, "key_cache", 4);
  check_dim(a.block_tables, "block_tables", 2);
  STD_TORCH_CHECK(a.kv_heads() > 0 && a.heads() > 0 && a.heads() % a.kv_heads() == 0, "query has ", a.heads(),
                  " heads, expected a multiple of the ", a.kv_heads(), " of block_key");
  STD_TORCH_CHECK(a.page_size() > 0, "key_cache has pages of ", a.page_size(), " tokens, expected at least 1");
  check_head_dims(a.head_dim());
  const auto block = {a.requests(), a.slots(), a.kv_heads(), a.head_dim()};
  const auto cache = {a.key_cache.size(0), a.page_size(), a.kv_heads(), a.head_dim()};
  check_shape(a.block_key, "block_key", block);
  check_shape(a.block_value, "block_value", block);
  check_shape(a.key_cache, "key_cache", cache);
  check_shape(a.value_cache, "value_cache", cache);
  check_shape(a.block_tables, "block_tables", {a.requests(), a.max_pages()});
  check_shape(a.context_lens, "context_lens", {a.requests()});
  check_shape(a.visible, "visible", {a.requests(), a.queries()});
}

void check_dtypes(const Arguments& a) {
  check_same_dtype(a.block_key, "block_key", a.query, "query");
  check_same_dtype(a.block_value, "block_value", a.query, "query");
  check_same_dtype(a.key_cache, "key_cache", a.query, "query");
  check_same_dtype(a.value_cache, "value_cache", a.query, "query");
  check_index(a.block_tables, "block_tables", ScalarType::Int);
  check_index(a.context_lens, "context_lens", ScalarType::Int);
  check_index(a.visible, "visible", ScalarType::Int);
}

void check_devices(const Arguments& a) {
  check_device(a.query, "query", a.query);
  check_device(a.block_key, "block_key", a.query);
  check_device(a.block_value, "block_value", a.query);
  check_device(a.key_cache, "key_cache", a.query);
  check_device(a.value_cache, "value_cache", a.query);
  check_device(a.block_tables, "block_tables", a.query);
  check_device(a.context_lens, "context_lens", a.query);
  check_device(a.visible, "visible", a.query);
}

BlockAttentionParams params_of(const Arguments& a, double scale) {
  BlockAttentionParams params{};
  params.query = rows_of(a.query, "query");
  params.block_key = rows_of(a.block_key, "block_key");
  params.block_value = rows_of(a.block_value, "block_value");
  params.key_cache = rows_of(a.key_cache, "key_cache");
  params.value_cache = rows_of(a.value_cache, "value_cache");
  params.block_tables = indices_of(a.block_tables);
  params.context_lens = indices_of(a.context_lens);
  params.visible = indices_of(a.visible);
  params.block_tables_stride = a.block_tables.stride(0);
  params.visible_stride = a.queries();
  params.requests = narrow(a.requests(), "the number of requests");
  params.queries = narrow(a.queries(), "the number of queries");
  params.slots = narrow(a.slots(), "the number of slots");
  params.heads = narrow(a.heads(), "the number of heads");
  params.kv_heads = narrow(a.kv_heads(), "the number of kv heads");
  params.head_dim = narrow(a.head_dim(), "head_dim");
  params.max_pages = narrow(a.max_pages(), "the width of block_tables");
  params.page_size = narrow(a.page_size(), "the page size");
  params.scale = static_cast<float>(scale);
  return params;
}

// The values of block_tables, context_lens and visible are on the device and are not checked: that would wait for it.
// Lengths beyond the block table and counts beyond the slots are cut; page ids must be right.
Tensor block_attention(const Tensor& query, const Tensor& block_key, const Tensor& block_value, const Tensor& key_cache,
                       const Tensor& value_cache, const Tensor& block_tables, const Tensor& context_lens,
                       const Tensor& visible, double scale) {
  const Arguments a{query, block_key, block_value, key_cache, value_cache, block_tables, context_lens, visible};
  check_shapes(a);
  const DType dtype = dtype_of<DType>(query, "query");
  check_dtypes(a);
  BlockAttentionParams params = params_of(a, scale);
  check_devices(a);
  const int32_t device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const AttentionShape shape{a.requests(),  a.queries(),   a.heads(),     a.kv_heads(),
                             a.head_dim(),  a.max_pages(), a.page_size(), static_cast<int64_t>(query.element_size())};
  Tensor output = torch::stable::new_empty(query, {a.requests(), a.queries(), a.heads(), a.head_dim()});
  // The allocator hands this memory to later work of this stream only, so it may be given back before the kernels run.
  Tensor scratch = torch::stable::new_empty(query, {scratch_floats(shape)}, ScalarType::Float);
  params.output = output.mutable_data_ptr();
  params.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  const auto stream = torch::stable::accelerator::getCurrentStream(device);
  const cudaError_t error = launch_block_attention(params, dtype, static_cast<cudaStream_t>(stream.nativeHandle()));
  STD_TORCH_CHECK(error == cudaSuccess, "block_attention could not be started: ", cudaGetErrorString(error));
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(slipstream, CUDA, m) { m.impl("block_attention", TORCH_BOX(&block_attention)); }

}  // namespace
}  // namespace cuda
}  // namespace slipstream
