// The part of CUDA that the kernels use, on the host: every CUDA thread is a thread, `__syncthreads` is a barrier.
//
// Thread blocks run in two groups at a time that share nothing, so that ThreadSanitizer knows of no order between the
// blocks of one group and those of the other. Shared memory is a fresh heap block of exactly the size asked for,
// filled with a pattern, so that AddressSanitizer sees its ends.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

using std::max;
using std::min;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace host_shim {

// What a thread block can have at most: 99 KiB on the smaller GPUs since compute capability 8.0.
#if !defined(HOST_SHIM_SHARED_BYTES)
#define HOST_SHIM_SHARED_BYTES (99 * 1024)
#endif

// The device that is imitated.
struct Device {
  int multiprocessors = 4;
  bool copies_late = false;  // asynchronous copies happen when they are waited for, not when they start
  int poison = 0xff;         // bytes that fresh shared memory holds
};
inline Device device;
inline std::map<const void*, size_t> allowed_shared_bytes;
constexpr int kGroups = 2;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host shim: %s\n", what);
  std::abort();
}

// What 32 threads need to run in step where an instruction of their warp says so; see warp_twins.h.
struct Warp {
  static constexpr int kLanes = 32, kWords = 6;
  uint32_t arrived = 0, phase = 0;
  uint64_t words[2][kLanes][kWords] = {};
};

struct Block {
  pthread_barrier_t barrier;
  unsigned char* shared = nullptr;
  std::vector<Warp> warps;
};

struct PendingCopy {
  void* to;
  const void* from;
};

inline thread_local Block* current_block;
inline thread_local std::vector<PendingCopy> pending_copies;

}  // namespace host_shim

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { pthread_barrier_wait(&host_shim::current_block->barrier); }

namespace host_shim {

// One CUDA thread after the other of the same index, in every block of a group.
template <typename Kernel, typename Params>
struct ThreadTask {
  Kernel* kernel;
  const Params* params;
  Block* block;
  dim3 grid, size;
  size_t shared_bytes;
  unsigned thread, group;

  static void* run(void* argument) {
    const ThreadTask& task = *static_cast<ThreadTask*>(argument);
    current_block = task.block;
    threadIdx = dim3(task.thread);
    blockDim = task.size;
    gridDim = task.grid;
    for (unsigned i = task.group; i < task.grid.x * task.grid.y; i += kGroups) {
      blockIdx = dim3(i % task.grid.x, i / task.grid.x);
      if (task.thread == 0) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, std::max<size_t>(task.shared_bytes, 1))) fail("out of memory");
        std::memset(memory, device.poison, task.shared_bytes);
        task.block->shared = static_cast<unsigned char*>(memory);
      }
      __syncthreads();
      task.kernel(*task.params);
      if (!pending_copies.empty()) fail("a kernel ended with copies that it had not waited for");
      __syncthreads();
      if (task.thread == 0) std::free(task.block->shared);
    }
    return nullptr;
  }
};

template <typename Kernel, typename Params>
void run_grid(Kernel* kernel, dim3 grid, dim3 size, size_t shared_bytes, const Params& params) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 * 1024);
  std::vector<Block> blocks(kGroups);
  std::vector<ThreadTask<Kernel, Params>> tasks;
  for (unsigned group = 0; group < kGroups; ++group) {
    pthread_barrier_init(&blocks[group].barrier, nullptr, size.x);
    blocks[group].warps.resize(size.x / Warp::kLanes);
    for (unsigned thread = 0; thread < size.x; ++thread) {
      tasks.push_back({kernel, &params, &blocks[group], grid, size, shared_bytes, thread, group});
    }
  }
  std::vector<pthread_t> threads(tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (pthread_create(&threads[i], &attributes, ThreadTask<Kernel, Params>::run, &tasks[i])) fail("no more threads");
  }
  for (const pthread_t& thread : threads) pthread_join(thread, nullptr);
  for (Block& block : blocks) pthread_barrier_destroy(&block.barrier);
  pthread_attr_destroy(&attributes);
}

}  // namespace host_shim

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = host_shim::device.multiprocessors;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > HOST_SHIM_SHARED_BYTES) return cudaErrorInvalidValue;
  host_shim::allowed_shared_bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}

template <typename Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 size, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const auto allowed = host_shim::allowed_shared_bytes.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = allowed == host_shim::allowed_shared_bytes.end() ? 48 * 1024 : allowed->second;
  if (shared_bytes > limit) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) return cudaErrorInvalidConfiguration;
  host_shim::run_grid(kernel, grid, size, shared_bytes, *static_cast<std::remove_const_t<Params>*>(arguments[0]));
  return cudaSuccess;
}
