// What one warp does with a tile of keys and values: scores, online softmax and sums of its sixteen rows, on matrix
// instructions.
#pragma once

#include "launch_plan.h"
#include "warp_primitives.cuh"

namespace slipstream {
namespace cuda {

inline constexpr float kMinusInfinity = -__builtin_inff();

// Shapes of the matrix instructions for T, and how their operands come from shared memory. `kAtOnce` operands of the
// right-hand side are loaded together.
template <typename T>
struct Matrices {
  static constexpr int kDepth = 16, kAtOnce = 2;

  // Columns [16 step, 16 step + 16) of the 16 query rows at `rows`.
  static __device__ __forceinline__ void load_query(uint32_t (&a)[4], const unsigned char* rows, int stride, int step,
                                                    int lane) {
    load_matrices(a, rows + lane % 16 * stride + step * 32 + lane / 16 * 16);
  }

  // The same columns of the keys 8 first to 8 first + 15.
  static __device__ __forceinline__ void load_keys(uint32_t (&b)[2][2], const unsigned char* keys, int stride,
                                                   int first, int step, int lane) {
    uint32_t parts[4];
    load_matrices(parts, keys + (first * 8 + lane / 16 * 8 + lane % 8) * stride + step * 32 + lane / 8 % 2 * 16);
    split(b, parts);
  }

  // Columns 8 first to 8 first + 15 of the values [16 step, 16 step + 16).
  static __device__ __forceinline__ void load_values(uint32_t (&b)[2][2], const unsigned char* values, int stride,
                                                     int first, int step, int lane) {
    uint32_t parts[4];
    load_transposed(parts, values + (step * 16 + lane % 16) * stride + first * 16 + lane / 16 * 16);
    split(b, parts);
  }

  // Weights of the tokens [16 step, 16 step + 16): the lanes hold what the instruction wants of them already.
  template <int kFragments>
  static __device__ __forceinline__ void weights(uint32_t (&a)[4], const float (&scores)[kFragments][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = scores[2 * step + i / 2] + i % 2 * 2;
      a[i] = pack(pair[0], pair[1], T());
    }
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_add(c, a, b, T());
  }

  // Two results are stored together.
  static __device__ __forceinline__ void store(void* output, int64_t index, float first, float second) {
    static_cast<uint32_t*>(output)[index / 2] = pack(first, second, T());
  }

 private:
  static __device__ __forceinline__ void split(uint32_t (&b)[2][2], const uint32_t (&parts)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = parts[i];
  }
};

// float32 on TF32 instructions: x = high + low, and of the four products all but low * low, which is below float32's
// own rounding, are summed.
template <>
struct Matrices<float> {
  static constexpr int kDepth = 8, kAtOnce = 1;

  static __device__ __forceinline__ void load_query(uint32_t (&a)[4], const unsigned char* rows, int stride, int step,
                                                    int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = word(rows, stride, lane / 4 + i % 2 * 8, step * 8 + lane % 4 + i / 2 * 4);
  }

  static __device__ __forceinline__ void load_keys(uint32_t (&b)[1][2], const unsigned char* keys, int stride,
                                                   int first, int step, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) b[0][i] = word(keys, stride, first * 8 + lane / 4, step * 8 + lane % 4 + i * 4);
  }

  // The instruction's eight tokens are taken in the order 0 2 4 6 1 3 5 7, on both sides: in that order the lanes hold
  // the weights already.
  static __device__ __forceinline__ void load_values(uint32_t (&b)[1][2], const unsigned char* values, int stride,
                                                     int first, int step, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) b[0][i] = word(values, stride, step * 8 + lane % 4 * 2 + i, first * 8 + lane / 4);
  }

  template <int kFragments>
  static __device__ __forceinline__ void weights(uint32_t (&a)[4], const float (&scores)[kFragments][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = as_bits(scores[step][i % 2 * 2 + i / 2]);
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    split(a, a_high, a_low);
    split(b, b_high, b_low);
    multiply_add_tf32(c, a_low, b_high);
    multiply_add_tf32(c, a_high, b_low);
    multiply_add_tf32(c, a_high, b_high);
  }

  static __device__ __forceinline__ void store(void* output, int64_t index, float first, float second) {
    static_cast<float2*>(output)[index / 2] = make_float2(first, second);
  }

 private:
  static __device__ __forceinline__ uint32_t word(const unsigned char* rows, int stride, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(rows + row * stride + column * 4);
  }

  template <int kCount>
  static __device__ __forceinline__ void split(const uint32_t (&x)[kCount], uint32_t (&high)[kCount],
                                               uint32_t (&low)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = to_tf32(as_float(x[i])) & 0xffffe000u;
      low[i] = to_tf32(as_float(x[i]) - as_float(high[i]));
    }
  }
};

// The largest value among the four lanes that hold a row, or their sum.
__device__ __forceinline__ float row_maximum(float value) {
  value = fmaxf(value, exchange(value, 1));
  return fmaxf(value, exchange(value, 2));
}
__device__ __forceinline__ float row_sum(float value) {
  value += exchange(value, 1);
  return value + exchange(value, 2);
}

// One warp's sixteen rows. Lane 4g+t holds parts of the rows g and g+8, `[0]` and `[1]` below.
template <typename T, int kHeadDim>
struct WarpRows {
  static constexpr SharedLayout kLayout = shared_layout(kHeadDim * sizeof(T));
  static constexpr int kTokens = kLayout.tokens, kStride = kLayout.stride;
  using M = Matrices<T>;

  float output[kHeadDim / 8][4];  // columns 8i + 2t and 8i + 2t + 1 of both rows
  float maximum[2];
  float sum[2];  // of this lane's weights

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& fragment : output) {
#pragma unroll
      for (float& element : fragment) element = 0.0f;
    }
    maximum[0] = maximum[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  // Takes in a tile of which the rows see the first limit[0] and limit[1] tokens. `scale` includes log2(e).
  __device__ __forceinline__ void attend(const unsigned char* query, const unsigned char* keys,
                                         const unsigned char* values, const int (&limit)[2], float scale, int lane) {
    float scores[kTokens / 8][4] = {};
    // Unrolled without a remainder, and not so far that the loads of later steps take up the registers.
    constexpr int kSteps = kHeadDim / M::kDepth;
    [[maybe_unused]] constexpr int kUnroll = kSteps <= 6 ? kSteps : kSteps % 5 == 0 ? 5 : 4;
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      M::load_query(a, query, kStride, step, lane);
#pragma unroll
      for (int i = 0; i < kTokens / 8; i += M::kAtOnce) {
        uint32_t b[M::kAtOnce][2];
        M::load_keys(b, keys, kStride, i, step, lane);
#pragma unroll
        for (int j = 0; j < M::kAtOnce; ++j) M::multiply(scores[i + j], a, b[j]);
      }
    }
    weigh(scores, limit, scale, lane);
#pragma unroll
    for (int step = 0; step < kTokens / M::kDepth; ++step) {
      uint32_t a[4];
      M::weights(a, scores, step);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; i += M::kAtOnce) {
        uint32_t b[M::kAtOnce][2];
        M::load_values(b, values, kStride, i, step, lane);
#pragma unroll
        for (int j = 0; j < M::kAtOnce; ++j) M::multiply(output[i + j], a, b[j]);
      }
    }
  }

 private:
  // Turns scores into weights, and rescales what was gathered under a smaller maximum.
  __device__ __forceinline__ void weigh(float (&scores)[kTokens / 8][4], const int (&limit)[2], float scale, int lane) {
    float correction[2], base[2];
    float largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = i * 8 + lane % 4 * 2 + e % 2;
        scores[i][e] = token < limit[e / 2] ? scores[i][e] * scale : kMinusInfinity;
        largest[e / 2] = fmaxf(largest[e / 2], scores[i][e]);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      largest[row] = row_maximum(largest[row]);
      // A row that has seen nothing so far has no maximum to subtract.
      base[row] = largest[row] == kMinusInfinity ? 0.0f : largest[row];
      correction[row] = exp2f(maximum[row] - base[row]);
      maximum[row] = largest[row];
      sum[row] *= correction[row];
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[i][e] = exp2f(scores[i][e] - base[e / 2]);
        sum[e / 2] += scores[i][e];
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) output[i][e] *= correction[e / 2];
    }
  }
};

}  // namespace cuda
}  // namespace slipstream
