// What happens to single rows between the linear layers and attention, for one instruction set.
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

// The sums of squares go lane by lane, whatever the other rows are.
static void add_and_normalise(const NormArgs& a, const float* row, const float* added, float* sum, float* target) {
  const int64_t whole = a.width / kWidth * kWidth;
  Vec lanes = broadcast(0.0f);
  for (int64_t i = 0; i < whole; i += kWidth) {
    const Vec value = added ? add(load(row + i), load(added + i)) : load(row + i);
    store(sum + i, value);
    lanes = fma(value, value, lanes);
  }
  float squares = reduce_add(lanes);
  for (int64_t i = whole; i < a.width; ++i) {
    sum[i] = added ? row[i] + added[i] : row[i];
    squares += sum[i] * sum[i];
  }
  const float factor = 1.0f / __builtin_sqrtf(squares / float(a.width) + a.eps);
  for (int64_t i = 0; i < whole; i += kWidth) {
    store(target + i, mul(mul(load(sum + i), broadcast(factor)), load(a.weight + i)));
  }
  for (int64_t i = whole; i < a.width; ++i) target[i] = sum[i] * factor * a.weight[i];
}

// silu(gate) * up = gate * up * sigmoid(gate). With m = min(gate, 0) and p = max(gate, 0) the sigmoid is
// e^m / (e^-p + e^m), in which nothing overflows.
SLIPSTREAM_INLINE Vec gated(Vec gate, Vec up) {
  const Vec zero = broadcast(0.0f), log2e = broadcast(1.44269504088896340736f);
  const Vec above = exp2(mul(sub(zero, max(gate, zero)), log2e));
  const Vec below = exp2(mul(sub(zero, max(sub(zero, gate), zero)), log2e));
  return mul(mul(gate, up), div(below, add(above, below)));
}

static void gate(const float* gate, const float* up, float* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(target + i, gated(load(gate + i), load(up + i)));
  for (; i < count; ++i) {
    float lanes[kWidth];
    store(lanes, gated(broadcast(gate[i]), broadcast(up[i])));
    target[i] = lanes[0];
  }
}

static void copy(const void* source, DType from, void* target, DType to, int64_t head_dim) {
  float row[256];
  load_row(source, from, row, head_dim);
  store_row(row, target, to, head_dim);
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
