// Compiled without contraction, as the kernels are: a fused product and sum would not be what the file was widened by.
#include "blocks.h"

#define SLIPSTREAM_ISA blocks
#include "convert.h"

namespace slipstream {
namespace {

using namespace blocks;

constexpr int kNumbers = 32;

bool same(float a, float b) { return bits_of(a) == bits_of(b); }

uint16_t half_bits(float value, float* rounded) {
  const uint16_t bits = to_float16(value);
  *rounded = from_float16(bits);
  return bits;
}

}  // namespace

bool find_q8_0(const float* weights, uint8_t* block) {
  float largest = 0.0f, scale;
  for (int i = 0; i < kNumbers; ++i) largest = __builtin_fmaxf(largest, __builtin_fabsf(weights[i]));
  const uint16_t scale_bits = half_bits(largest / 127.0f, &scale);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  bool exact = true;
  for (int i = 0; i < kNumbers; ++i) {
    const float number = float(__builtin_lrintf(weights[i] * inverse));
    // Zero times a scale has lost its sign; both zeros are the same weight.
    exact = exact && __builtin_fabsf(number) <= 127.0f && number * scale == weights[i];
    block[2 + i] = uint8_t(int8_t(number));
  }
  memcpy(block, &scale_bits, 2);
  return exact;
}

bool find_q4_1(const float* weights, uint8_t* block) {
  float least = weights[0], most = weights[0], scale, offset;
  for (int i = 1; i < kNumbers; ++i) {
    least = __builtin_fminf(least, weights[i]);
    most = __builtin_fmaxf(most, weights[i]);
  }
  const uint16_t bits[2] = {half_bits((most - least) / 15.0f, &scale), half_bits(least, &offset)};
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  bool exact = true;
  for (int i = 0; i < kNumbers; ++i) {
    const float number = float(__builtin_lrintf((weights[i] - offset) * inverse));
    exact = exact && number >= 0.0f && number <= 15.0f && same(number * scale + offset, weights[i]);
    const uint8_t low = uint8_t(int(number) & 15);
    uint8_t* const byte = block + 4 + i % 16;
    *byte = i < 16 ? low : uint8_t(*byte | low << 4);
  }
  memcpy(block, bits, 4);
  return exact;
}

}  // namespace slipstream
