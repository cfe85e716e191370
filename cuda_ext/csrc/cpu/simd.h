// One vector type per instruction set, chosen by the flags that this translation unit is compiled with.
//
// Included inside the namespace of one instruction set, see args.h. Every operation is the same for every lane, so a
// row's result depends on its lanes' contents only.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "convert.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

#define SLIPSTREAM_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

using Vec = __m512;
static constexpr int kWidth = 16;

SLIPSTREAM_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SLIPSTREAM_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
SLIPSTREAM_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
SLIPSTREAM_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SLIPSTREAM_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SLIPSTREAM_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SLIPSTREAM_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SLIPSTREAM_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SLIPSTREAM_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
SLIPSTREAM_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
SLIPSTREAM_INLINE Vec round_nearest(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// value * 2^exponent, zero where exponent is below -126.
SLIPSTREAM_INLINE Vec scale_by_power(Vec value, Vec exponent) {
  const __mmask16 kept = _mm512_cmp_ps_mask(exponent, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(kept, value, exponent);
}

SLIPSTREAM_INLINE Vec widen_bfloat16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
SLIPSTREAM_INLINE Vec widen_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

SLIPSTREAM_INLINE Vec widen_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// The low or the high halves of bytes. A permutation looks at four bits of an index only, so it finds the number that
// they stand for without a mask and without a conversion.
template <bool high>
SLIPSTREAM_INLINE Vec widen_nibbles(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(high ? _mm512_srli_epi32(wide, 4) : wide, numbers);
}

// Sixteen rows of sixteen to sixteen columns: target[i * stride + j] = rows[j][i].
SLIPSTREAM_INLINE void store_transposed(const Vec* rows, float* target, int64_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d lower = _mm512_castps_pd(a[i + h]), upper = _mm512_castps_pd(a[i + 2 + h]);
      b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lower, upper));
      b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lower, upper));
    }
  }
  // b[4 g + c] holds, in 128-bit lane l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    _mm512_storeu_ps(target + c * stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(target + (4 + c) * stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(target + (8 + c) * stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(target + (12 + c) * stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}

#elif defined(__AVX2__)

using Vec = __m256;
static constexpr int kWidth = 8;

SLIPSTREAM_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SLIPSTREAM_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
SLIPSTREAM_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
SLIPSTREAM_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SLIPSTREAM_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SLIPSTREAM_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SLIPSTREAM_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SLIPSTREAM_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SLIPSTREAM_INLINE float reduce_max(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
SLIPSTREAM_INLINE float reduce_add(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
SLIPSTREAM_INLINE Vec round_nearest(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SLIPSTREAM_INLINE Vec scale_by_power(Vec value, Vec exponent) {
  const Vec kept = _mm256_cmp_ps(exponent, _mm256_set1_ps(-126.0f), _CMP_GE_OQ);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(kept, _mm256_mul_ps(value, _mm256_castsi256_ps(power)));
}

SLIPSTREAM_INLINE Vec widen_bfloat16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
SLIPSTREAM_INLINE Vec widen_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

SLIPSTREAM_INLINE Vec widen_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <bool high>
SLIPSTREAM_INLINE Vec widen_nibbles(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtepi32_ps(high ? _mm256_srli_epi32(wide, 4) : _mm256_and_si256(wide, _mm256_set1_epi32(15)));
}

// Eight rows of eight to eight columns: target[i * stride + j] = rows[j][i].
SLIPSTREAM_INLINE void store_transposed(const Vec* rows, float* target, int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
      b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
    }
  }
  // b[4 g + c] holds, in 128-bit lane l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(target + c * stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x20));
    _mm256_storeu_ps(target + (4 + c) * stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x31));
  }
}

#else

// Without vector instructions of its own choosing; four lanes leave the compiler room to use the baseline's.
struct Vec {
  float lane[4];
};
static constexpr int kWidth = 4;

#define SLIPSTREAM_LANES(expression)              \
  Vec result;                                     \
  for (int i = 0; i < 4; ++i) result.lane[i] = (expression); \
  return result

SLIPSTREAM_INLINE Vec load(const float* p) { SLIPSTREAM_LANES(p[i]); }
SLIPSTREAM_INLINE void store(float* p, Vec v) {
  for (int i = 0; i < 4; ++i) p[i] = v.lane[i];
}
SLIPSTREAM_INLINE Vec broadcast(float x) { SLIPSTREAM_LANES(x); }
SLIPSTREAM_INLINE Vec add(Vec a, Vec b) { SLIPSTREAM_LANES(a.lane[i] + b.lane[i]); }
SLIPSTREAM_INLINE Vec sub(Vec a, Vec b) { SLIPSTREAM_LANES(a.lane[i] - b.lane[i]); }
SLIPSTREAM_INLINE Vec mul(Vec a, Vec b) { SLIPSTREAM_LANES(a.lane[i] * b.lane[i]); }
SLIPSTREAM_INLINE Vec div(Vec a, Vec b) { SLIPSTREAM_LANES(a.lane[i] / b.lane[i]); }
SLIPSTREAM_INLINE Vec max(Vec a, Vec b) { SLIPSTREAM_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
// Two roundings: a fused one would be a library call here.
SLIPSTREAM_INLINE Vec fma(Vec a, Vec b, Vec c) { SLIPSTREAM_LANES(a.lane[i] * b.lane[i] + c.lane[i]); }
SLIPSTREAM_INLINE float reduce_max(Vec v) {
  const float low = v.lane[0] > v.lane[1] ? v.lane[0] : v.lane[1];
  const float high = v.lane[2] > v.lane[3] ? v.lane[2] : v.lane[3];
  return low > high ? low : high;
}
SLIPSTREAM_INLINE float reduce_add(Vec v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
// Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even, for the magnitudes that matter here.
SLIPSTREAM_INLINE Vec round_nearest(Vec v) {
  SLIPSTREAM_LANES(v.lane[i] < -4194304.0f ? v.lane[i] : (v.lane[i] + 12582912.0f) - 12582912.0f);
}
SLIPSTREAM_INLINE Vec scale_by_power(Vec value, Vec exponent) {
  SLIPSTREAM_LANES(
      exponent.lane[i] >= -126.0f ? value.lane[i] * float_of(uint32_t(int32_t(exponent.lane[i]) + 127) << 23) : 0.0f);
}
SLIPSTREAM_INLINE Vec widen_bfloat16(const uint16_t* p) { SLIPSTREAM_LANES(from_bfloat16(p[i])); }
SLIPSTREAM_INLINE Vec widen_float16(const uint16_t* p) { SLIPSTREAM_LANES(from_float16(p[i])); }

SLIPSTREAM_INLINE Vec widen_int8(const int8_t* p) { SLIPSTREAM_LANES(float(p[i])); }
template <bool high>
SLIPSTREAM_INLINE Vec widen_nibbles(const uint8_t* p) { SLIPSTREAM_LANES(float(high ? p[i] >> 4 : p[i] & 15)); }

SLIPSTREAM_INLINE void store_transposed(const Vec* rows, float* target, int64_t stride) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) target[i * stride + j] = rows[j].lane[i];
  }
}

#undef SLIPSTREAM_LANES

#endif

template <DType dtype>
SLIPSTREAM_INLINE Vec load_as_float(const void* row, int64_t at) {
  if constexpr (dtype == DType::kFloat32) return load(static_cast<const float*>(row) + at);
  else if constexpr (dtype == DType::kBFloat16) return widen_bfloat16(static_cast<const uint16_t*>(row) + at);
  else return widen_float16(static_cast<const uint16_t*>(row) + at);
}

// 2^x for x up to 0 (and a little above); exactly zero below -126, minus infinity included. Polynomial of degree six
// for 2^f on [-1/2, 1/2] with the coefficients of Cephes' exp2f, error about 2 ulp.
SLIPSTREAM_INLINE Vec exp2(Vec x) {
  const Vec whole = round_nearest(x), f = sub(x, whole);
  Vec p = broadcast(1.535336188319500e-4f);
  p = fma(p, f, broadcast(1.339887440266574e-3f));
  p = fma(p, f, broadcast(9.618437357674640e-3f));
  p = fma(p, f, broadcast(5.550332471162809e-2f));
  p = fma(p, f, broadcast(2.402264791363012e-1f));
  p = fma(p, f, broadcast(6.931472028550421e-1f));
  return scale_by_power(fma(p, f, broadcast(1.0f)), whole);
}

SLIPSTREAM_INLINE float exp2(float x) {
  float lanes[kWidth];
  store(lanes, exp2(broadcast(x)));
  return lanes[0];
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
