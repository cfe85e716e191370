// Scalar conversions between float and the 16-bit formats, rounding to nearest, ties to even.
//
// Included inside the namespace of one instruction set, see args.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "args.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float from_bfloat16(uint16_t value) { return float_of(uint32_t(value) << 16); }

static inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);  // stay NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_float16(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000) << 16, magnitude = value & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + 0x38000000));
  return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));  // subnormal or zero, exact
}

static inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to at least 65,520: infinity
  if (magnitude < 0x38800000) {
    // Below the smallest normal number the sum's own rounding does the work: 0.5 has ulps of 2^-24.
    return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | uint16_t((rounded - 0x38000000) >> 13);
}

static inline void load_row(const void* source, DType dtype, float* target, int64_t count) {
  if (dtype == DType::kFloat32) {
    memcpy(target, source, size_t(count) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) target[i] = from_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = from_float16(from[i]);
  }
}

static inline void store_row(const float* source, void* target, DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) {
    memcpy(target, source, size_t(count) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(target);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float16(source[i]);
  }
}

// Address of row [outer, middle, head].
static inline char* row_at(const Rows& rows, int64_t outer, int64_t middle, int64_t head) {
  const int64_t size = rows.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<char*>(rows.data) + size * (outer * rows.outer + middle * rows.middle + head * rows.head);
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
