// RMS norm and rotary embedding of single rows, for one instruction set.
#pragma once

#include "simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

// Root-mean-square norm in place; `weight` has `count` elements.
static void normalise(float* row, const float* weight, float eps, int64_t count) {
  float squares = 0.0f;
  for (int64_t i = 0; i < count; ++i) squares += row[i] * row[i];
  const float factor = 1.0f / __builtin_sqrtf(squares / float(count) + eps);
  for (int64_t i = 0; i < count; ++i) row[i] = row[i] * factor * weight[i];
}

static void rotate(const RotaryArgs& a, int64_t position, const void* source, DType from, void* target, DType to) {
  float row[256], rotated[256];
  load_row(source, from, row, a.head_dim);
  if (a.norm) normalise(row, a.norm, a.eps, a.head_dim);
  const float* const cosines = a.table + position * 2 * a.head_dim;
  const float* const sines = cosines + a.head_dim;  // negated in the first half
  const int64_t half = a.head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    rotated[i] = row[i] * cosines[i] + row[i + half] * sines[i];
    rotated[i + half] = row[i + half] * cosines[i + half] + row[i] * sines[i + half];
  }
  store_row(rotated, target, to, a.head_dim);
}

static void copy(const void* source, DType from, void* target, DType to, int64_t head_dim) {
  float row[256];
  load_row(source, from, row, head_dim);
  store_row(row, target, to, head_dim);
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
