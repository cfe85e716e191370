// What the kernels need of a GPU beyond C++: instructions of whole warps on matrix fragments, asynchronous copies, and
// conversions.
//
// Two versions exist. The one here, under __CUDACC__, is PTX for compute capability 8.0 and later; it has been compiled
// and has never run, on any GPU. Tests compile the kernels for the host and find the other version, `warp_twins.h`,
// which does in plain C++, with one thread per lane, what the PTX manual says of each instruction. What is tested is
// the kernels on the twins.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)
#include <warp_twins.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "block attention needs compute capability 8.0 or later"
#endif

#define SLIPSTREAM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace slipstream {
namespace cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes to shared memory, or zeros where there is nothing to copy; `global` is then not read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Waits for the copies that this thread started.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements. Lanes 8j to 8j+7 point to the rows of matrix j; every lane gets the elements 2t
// and 2t+1 of row g of each matrix in `to[j]`, where g = lane / 4 and t = lane % 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: elements g of the rows 2t and 2t+1.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a of 16 x depth, b of depth x 8 and c of 16 x 8 elements, spread over the lanes:
//   c: rows g and g+8, columns 2t and 2t+1; c[0] and c[1] are of row g.
//   16 bits, depth 16: a[0] row g, a[1] row g+8, columns 2t and 2t+1; a[2], a[3] the same of columns 8 later;
//                      b[0] rows 2t and 2t+1 of column g; b[1] of rows 8 later.
//   TF32, depth 8:     a[0] row g, a[1] row g+8, column t; a[2], a[3] of column t+4; b[0] row t of column g; b[1] t+4.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest number of 8 exponent and 10 mantissa bits, ties away from zero. The low bits are not specified.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// Two numbers rounded to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The value of lane ^ mask.
__device__ __forceinline__ float exchange(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ __forceinline__ int exchange(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

}  // namespace cuda
}  // namespace slipstream

#endif  // __CUDACC__
