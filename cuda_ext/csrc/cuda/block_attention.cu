// Launcher of block attention: picks the kernels for a type and a head dimension and starts them. Nothing of torch.
//
// Kernels are started through the runtime's functions and not with <<<>>>, so that a host compiler reads this file too.

#include "block_attention.cuh"

#include <cuda_runtime.h>

namespace slipstream {
namespace cuda {
namespace {

// What a thread block may use without asking.
constexpr int64_t kSharedBytesWithoutAsking = 48 * 1024;

template <typename Kernel>
cudaError_t start(Kernel* kernel, dim3 grid, int64_t shared_bytes, BlockAttentionParams params, cudaStream_t stream) {
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, static_cast<size_t>(shared_bytes), stream);
}

template <typename T, int kHeadDim>
cudaError_t launch(const BlockAttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
  const cudaError_t error = start(&attend_chunks<T, kHeadDim>, grid, plan.shared_bytes, params, stream);
  if (error != cudaSuccess || plan.combine_blocks == 0) return error;
  return start(&combine_chunks<T>, dim3(static_cast<unsigned>(plan.combine_blocks)), 0, params, stream);
}

template <typename T>
cudaError_t launch_for(const BlockAttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
  switch (params.head_dim) {
#define SLIPSTREAM_CASE(head_dim) \
  case head_dim: return launch<T, head_dim>(params, plan, stream);
    SLIPSTREAM_HEAD_DIMS(SLIPSTREAM_CASE)
#undef SLIPSTREAM_CASE
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_block_attention(BlockAttentionParams params, DType dtype, cudaStream_t stream) {
  if (params.requests == 0 || params.queries == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const AttentionShape shape{params.requests,  params.queries,  params.heads,
                             params.kv_heads,  params.head_dim, params.max_pages,
                             params.page_size, dtype == DType::kFloat32 ? 4 : 2};
  const LaunchPlan plan = plan_launch(shape, multiprocessors);
  if (plan.blocks_x > kMostBlocks || plan.combine_blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  params.chunks = static_cast<int32_t>(plan.chunks);
  params.scratch_outputs = plan.scratch_outputs;
  switch (dtype) {
    case DType::kFloat32: return launch_for<float>(params, plan, stream);
    case DType::kBFloat16: return launch_for<__nv_bfloat16>(params, plan, stream);
    case DType::kFloat16: return launch_for<__half>(params, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace slipstream
