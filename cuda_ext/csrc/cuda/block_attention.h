// Arguments of block attention on CUDA devices and how to start it. Nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace slipstream {
namespace cuda {

// The head dimensions that there are kernels for. Tests compile fewer.
#if !defined(SLIPSTREAM_HEAD_DIMS)
#define SLIPSTREAM_HEAD_DIMS(X) X(64) X(80) X(96) X(128) X(256)
#endif

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Rows of `head_dim` contiguous elements, each 16-byte aligned. Strides are in elements.
struct Rows {
  const void* data;
  int64_t outer, middle, head;  // [requests, queries or slots, heads] or [pages, page_size, heads]
};

struct BlockAttentionParams {
  Rows query;                   // [requests, queries, heads, head_dim]
  Rows block_key, block_value;  // [requests, slots, kv_heads, head_dim]
  Rows key_cache, value_cache;  // [pages, page_size, kv_heads, head_dim]
  void* output;                 // [requests, queries, heads, head_dim], contiguous
  float* scratch;               // LaunchPlan::scratch_floats
  const int32_t* block_tables;  // [requests, max_pages]
  const int32_t* context_lens;  // [requests]
  const int32_t* visible;       // [requests, queries]
  int64_t block_tables_stride, visible_stride;
  int32_t requests, queries, slots, heads, kv_heads, head_dim, max_pages, page_size;
  int64_t scratch_outputs;  // floats before the log-sum-exps
  int32_t chunks;           // per row in the scratch memory
  float scale;              // on the dot products
};

// Starts the kernels on a stream of the current device; `scratch_outputs` and `chunks` are filled in here. Errors:
// cudaErrorInvalidValue for a head_dim without kernels, and those of the launch.
cudaError_t launch_block_attention(BlockAttentionParams params, DType dtype, cudaStream_t stream);

}  // namespace cuda
}  // namespace slipstream
