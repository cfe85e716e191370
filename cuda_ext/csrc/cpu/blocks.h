// Finding the GGUF blocks that float weights were widened from.
#pragma once

#include <cstdint>

namespace slipstream {

inline constexpr int64_t kQ8_0Bytes = 34;  // scale, 32 numbers
inline constexpr int64_t kQ4_1Bytes = 20;  // scale, offset, 32 numbers in 16 bytes

// Writes the block of 32 `weights` that widens to exactly these numbers; returns whether there is one.
bool find_q8_0(const float* weights, uint8_t* block);
bool find_q4_1(const float* weights, uint8_t* block);

}  // namespace slipstream
