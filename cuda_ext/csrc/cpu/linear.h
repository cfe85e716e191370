// Linear layers with few rows, for one instruction set.
//
// Decoding reads all weights for a handful of rows, so the weights are what costs: each is read once per call, from
// panels that are streamed in order, and widened in registers. One accumulator per output, inputs in order: the number
// of rows, of panels at once and of threads never shows in a result.
#pragma once

#include "simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

static constexpr int kPanelVectors = kPanel / kWidth;
static constexpr int64_t kInputs = 128;  // inputs after which the next rows take their turn: their weights stay cached

#if defined(__AVX512F__)
static constexpr int kMostSums = 24;  // vectors of sums of a register block, beside weights and what widens them
static constexpr int kMostRows = 8;   // rows of a register block
static constexpr int kWidenings = 3;  // of a weight, that cost less than a copy of it
#else
static constexpr int kMostSums = 12;
static constexpr int kMostRows = 6;
static constexpr int kWidenings = 1;
#endif

// Walks down one panel. `seek` must be called at multiples of kBlock; `at` gives the weights of input k + i, where k is
// a multiple of kTogether and i below it.
template <WeightFormat format>
struct Panel {
  static constexpr int kTogether = 1;
  static constexpr int64_t kSize = format == WeightFormat::kFloat32 ? 4 : format == WeightFormat::kInt8 ? 1 : 2;
  const char* data;

  Panel() = default;
  Panel(const void* panels, int64_t index, int64_t in)
      : data(static_cast<const char*>(panels) + index * in * kPanel * kSize) {}

  void seek(int64_t) {}

  inline __attribute__((always_inline)) Vec at(int64_t k, int, int v) const {
    const char* const row = data + (k * kPanel + v * kWidth) * kSize;
    if constexpr (format == WeightFormat::kFloat32) return load(reinterpret_cast<const float*>(row));
    if constexpr (format == WeightFormat::kBFloat16) return widen_bfloat16(reinterpret_cast<const uint16_t*>(row));
    if constexpr (format == WeightFormat::kFloat16) return widen_float16(reinterpret_cast<const uint16_t*>(row));
    if constexpr (format == WeightFormat::kInt8) return widen_int8(reinterpret_cast<const int8_t*>(row));
  }
};

// The weights are the very numbers that whoever widens the blocks to float beforehand gets. Where he rounds a product and
// then a sum, one rounding does here: a product of a float16 and a small integer is exact.
template <>
struct Panel<WeightFormat::kQ8_0> {
  static constexpr int kTogether = 1;
  static constexpr int64_t kBytes = kPanel * 2 + kBlock * kPanel;
  const char* data;
  const char* block;
  Vec scale[kPanelVectors];

  Panel() = default;
  Panel(const void* panels, int64_t index, int64_t in)
      : data(static_cast<const char*>(panels) + index * (in / kBlock) * kBytes) {}

  inline __attribute__((always_inline)) void seek(int64_t k) {
    block = data + k / kBlock * kBytes;
    for (int v = 0; v < kPanelVectors; ++v) {
      scale[v] = widen_float16(reinterpret_cast<const uint16_t*>(block) + v * kWidth);
    }
  }

  inline __attribute__((always_inline)) Vec at(int64_t k, int, int v) const {
    const char* const row = block + kPanel * 2 + k % kBlock * kPanel + v * kWidth;
    return mul(widen_int8(reinterpret_cast<const int8_t*>(row)), scale[v]);
  }
};

template <>
struct Panel<WeightFormat::kQ4_1> {
  static constexpr int kTogether = 2;
  static constexpr int64_t kBytes = kPanel * 4 + kBlock / 2 * kPanel;
  const char* data;
  const char* block;
  Vec scale[kPanelVectors], offset[kPanelVectors];

  Panel() = default;
  Panel(const void* panels, int64_t index, int64_t in)
      : data(static_cast<const char*>(panels) + index * (in / kBlock) * kBytes) {}

  inline __attribute__((always_inline)) void seek(int64_t k) {
    block = data + k / kBlock * kBytes;
    for (int v = 0; v < kPanelVectors; ++v) {
      scale[v] = widen_float16(reinterpret_cast<const uint16_t*>(block) + v * kWidth);
      offset[v] = widen_float16(reinterpret_cast<const uint16_t*>(block) + kPanel + v * kWidth);
    }
  }

  inline __attribute__((always_inline)) Vec at(int64_t k, int i, int v) const {
    const uint8_t* const row =
        reinterpret_cast<const uint8_t*>(block) + kPanel * 4 + k % kBlock / 2 * kPanel + v * kWidth;
    return fma(i ? widen_nibbles<true>(row) : widen_nibbles<false>(row), scale[v], offset[v]);
  }
};

// The outputs of a register block: where they begin and how many columns exist.
struct Target {
  float* data;
  int64_t stride, columns;
};

SLIPSTREAM_INLINE Vec load_columns(const float* row, int64_t from, int64_t columns) {
  if (from + kWidth <= columns) return load(row + from);
  float lanes[kWidth] = {};
  for (int64_t i = from; i < columns; ++i) lanes[i - from] = row[i];
  return load(lanes);
}

SLIPSTREAM_INLINE void store_columns(float* row, int64_t from, int64_t columns, Vec value) {
  if (from + kWidth <= columns) return store(row + from, value);
  float lanes[kWidth];
  store(lanes, value);
  for (int64_t i = from; i < columns; ++i) row[i] = lanes[i - from];
}

template <WeightFormat format, int kRows, int kPanels>
SLIPSTREAM_INLINE void multiply_inputs(
    const float* input, int64_t stride, int64_t begin, int64_t end, Panel<format>* panels,
    Vec (&sums)[kRows][kPanels * kPanelVectors]) {
  for (int p = 0; p < kPanels; ++p) panels[p].seek(begin);
  constexpr int kTogether = Panel<format>::kTogether;
  for (int64_t k = begin; k < end; k += kTogether) {
#pragma GCC unroll 2
    for (int i = 0; i < kTogether; ++i) {
      Vec weight[kPanels * kPanelVectors];
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kPanelVectors; ++v) weight[p * kPanelVectors + v] = panels[p].at(k, i, v);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vec x = broadcast(input[r * stride + k + i]);
        for (int v = 0; v < kPanels * kPanelVectors; ++v) sums[r][v] = fma(x, weight[v], sums[r][v]);
      }
    }
  }
}

// Inputs [begin, end) of some rows and panels; goes on from what `target` holds unless `begin` is 0.
template <WeightFormat format, int kRows, int kPanels>
static void multiply(
    const float* input, int64_t stride, int64_t begin, int64_t end, Panel<format>* panels, const Target& target) {
  Vec sums[kRows][kPanels * kPanelVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanels * kPanelVectors; ++v) {
      sums[r][v] = begin == 0 ? broadcast(0.0f) : load_columns(target.data + r * target.stride, v * kWidth, target.columns);
    }
  }
  for (int64_t k = begin; k < end; k += kBlock) {
    multiply_inputs<format, kRows, kPanels>(input, stride, k, k + kBlock < end ? k + kBlock : end, panels, sums);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanels * kPanelVectors; ++v) {
      store_columns(target.data + r * target.stride, v * kWidth, target.columns, sums[r][v]);
    }
  }
}

// Rows one register block after the other, over weights that the first of them brought into the cache.
template <WeightFormat format, int kRows, int kPanels>
SLIPSTREAM_INLINE int64_t multiply_rows(
    const LinearArgs& a, int64_t row, int64_t begin, int64_t end, Panel<format>* panels, const Target& target) {
  for (; row + kRows <= a.rows; row += kRows) {
    const Target at{target.data + row * target.stride, target.stride, target.columns};
    multiply<format, kRows, kPanels>(a.input + row * a.input_stride, a.input_stride, begin, end, panels, at);
  }
  return row;
}

// Rows that a register block holds beside the weights of so many panels.
template <int kPanels>
inline constexpr int kRowsBeside =
    kPanels * kPanelVectors * kMostRows > kMostSums ? kMostSums / (kPanels * kPanelVectors) : kMostRows;

// All rows in register blocks of `size` rows, the last of them of one row less: a block of a row or two would wait for
// its own sums.
template <WeightFormat format, int kPanels, int kRows = kRowsBeside<kPanels>>
static void multiply_all(
    const LinearArgs& a, int64_t row, int64_t size, int64_t begin, int64_t end, Panel<format>* panels,
    const Target& target) {
  if (size >= kRows) row = multiply_rows<format, kRows, kPanels>(a, row, begin, end, panels, target);
  if constexpr (kRows > 1) {
    if (row < a.rows) multiply_all<format, kPanels, kRows - 1>(a, row, size, begin, end, panels, target);
  }
}

template <WeightFormat format, int kPanels>
static void run_panels(const LinearArgs& a, int64_t first) {
  const Target target{a.output + first * kPanel, a.output_stride, a.out - first * kPanel};
  Panel<format> panels[kPanels];
  for (int p = 0; p < kPanels; ++p) panels[p] = Panel<format>(a.panels, first + p, a.in);
  const int64_t blocks = (a.rows + kRowsBeside<kPanels> - 1) / kRowsBeside<kPanels>;
  const int64_t size = (a.rows + blocks - 1) / blocks;
  if (blocks == 1) {
    multiply_all<format, kPanels>(a, 0, size, 0, a.in, panels, target);
    return;
  }
  for (int64_t begin = 0; begin < a.in; begin += kInputs) {
    const int64_t end = begin + kInputs < a.in ? begin + kInputs : a.in;
    if (format == WeightFormat::kFloat32 || blocks <= kWidenings) {
      multiply_all<format, kPanels>(a, 0, size, begin, end, panels, target);
    } else {
      // Widened once for all rows.
      alignas(64) float wide[kPanels * kInputs * kPanel];
      for (int p = 0; p < kPanels; ++p) {
        for (int64_t k = begin; k < end; k += Panel<format>::kTogether) {
          if (k % kBlock == 0) panels[p].seek(k);
#pragma GCC unroll 2
          for (int i = 0; i < Panel<format>::kTogether; ++i) {
            for (int v = 0; v < kPanelVectors; ++v) {
              store(wide + (p * kInputs + k + i - begin) * kPanel + v * kWidth, panels[p].at(k, i, v));
            }
          }
        }
      }
      Panel<WeightFormat::kFloat32> copies[kPanels];
      for (int p = 0; p < kPanels; ++p) {
        copies[p].data = reinterpret_cast<const char*>(wide + (p * kInputs - begin) * kPanel);
      }
      multiply_all<WeightFormat::kFloat32, kPanels>(a, 0, size, begin, end, copies, target);
    }
  }
}

// Panels that a register block reads at once. More of them share the loads of the inputs, fewer let it hold more rows
// and so widen the weights less often; where one or the other pays was measured.
template <WeightFormat format>
static int panels_at_once(int64_t rows) {
  if (kPanelVectors > 1) return rows <= 2 ? 2 : 1;
  if (rows <= kRowsBeside<4>) return 4;
  if (rows <= kRowsBeside<3>) return 3;
  if (format == WeightFormat::kFloat32 || rows <= 2 * kRowsBeside<4>) return 4;
  return rows <= kWidenings * kRowsBeside<3> ? 3 : 2;
}

template <WeightFormat format, int kPanels>
static int64_t run_whole(const LinearArgs& a, int64_t panel, int64_t last) {
  for (; panel + kPanels <= last; panel += kPanels) run_panels<format, kPanels>(a, panel);
  return panel;
}

template <WeightFormat format>
static void run_linear(const LinearArgs& a, int64_t first, int64_t last) {
  const int at_once = panels_at_once<format>(a.rows);
  int64_t panel = first;
  if constexpr (kPanelVectors == 1) {
    if (at_once == 4) panel = run_whole<format, 4>(a, panel, last);
    if (at_once == 3) panel = run_whole<format, 3>(a, panel, last);
  }
  if (at_once == 2) panel = run_whole<format, 2>(a, panel, last);
  run_whole<format, 1>(a, panel, last);
  if constexpr (format == WeightFormat::kInt8) {
    const int64_t end = last * kPanel < a.out ? last * kPanel : a.out;
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t n = first * kPanel; n < end; ++n) a.output[r * a.output_stride + n] *= a.scales[n];
    }
  }
}

static void linear(const LinearArgs& a, int64_t first, int64_t last) {
  switch (a.format) {
    case WeightFormat::kFloat32: return run_linear<WeightFormat::kFloat32>(a, first, last);
    case WeightFormat::kBFloat16: return run_linear<WeightFormat::kBFloat16>(a, first, last);
    case WeightFormat::kFloat16: return run_linear<WeightFormat::kFloat16>(a, first, last);
    case WeightFormat::kInt8: return run_linear<WeightFormat::kInt8>(a, first, last);
    case WeightFormat::kQ8_0: return run_linear<WeightFormat::kQ8_0>(a, first, last);
    case WeightFormat::kQ4_1: return run_linear<WeightFormat::kQ4_1>(a, first, last);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
