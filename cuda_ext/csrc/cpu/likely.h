// The likeliest tokens of a row of logits, for one instruction set.
#pragma once

#include "simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

// A falling list of the largest values seen so far, with where they stood.
struct Largest {
  float* values;
  int64_t* places;
  int64_t count;

  float least() const { return values[count - 1]; }

  // Behind its equals, which stood further to the front.
  void take(float value, int64_t place) const {
    int64_t at = count - 1;
    for (; at > 0 && values[at - 1] < value; --at) {
      values[at] = values[at - 1];
      places[at] = places[at - 1];
    }
    values[at] = value;
    places[at] = place;
  }
};

static void likely(const LikelyArgs& a, float* scratch) {
  const Largest best{a.probabilities, a.tokens, a.count};
  for (int64_t i = 0; i < a.count; ++i) {
    best.values[i] = -__builtin_inff();
    best.places[i] = -1;
  }
  const int64_t whole = a.vocab / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const Vec row = a.bias ? add(load(a.logits + i), load(a.bias + i)) : load(a.logits + i);
    store(scratch + i, row);
    if (!(reduce_max(row) > best.least())) continue;
    for (int64_t j = i; j < i + kWidth; ++j) {
      if (scratch[j] > best.least()) best.take(scratch[j], j);
    }
  }
  for (int64_t i = whole; i < a.vocab; ++i) {
    scratch[i] = a.bias ? a.logits[i] + a.bias[i] : a.logits[i];
    if (scratch[i] > best.least()) best.take(scratch[i], i);
  }
  constexpr float kLog2E = 1.44269504088896340736f;
  const float maximum = best.values[0];
  Vec lanes = broadcast(0.0f);
  for (int64_t i = 0; i < whole; i += kWidth) {
    lanes = add(lanes, exp2(mul(sub(load(scratch + i), broadcast(maximum)), broadcast(kLog2E))));
  }
  float sum = reduce_add(lanes);
  for (int64_t i = whole; i < a.vocab; ++i) sum += exp2((scratch[i] - maximum) * kLog2E);
  *a.log_sum = maximum + __builtin_logf(sum);
  for (int64_t i = 0; i < a.count; ++i) best.values[i] = exp2((best.values[i] - maximum) * kLog2E) / sum;
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
