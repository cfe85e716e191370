#include "layer.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"

#define SLIPSTREAM_ISA layer
#include "convert.h"

namespace slipstream {
namespace {

using layer::row_at;

// Rows that are worth waking a thread for, between the linear layers.
constexpr int64_t kRowsPerThread = 16;

// Rows that go through the feed-forward network together: its inner rows are wide, and should stay in the cache.
constexpr int64_t kSlab = 256;

// Memory of the calling thread for the rows between the steps of a layer; it is kept for the next layer.
class Workspace {
 public:
  explicit Workspace(const LayerArgs& a) {
    const int64_t slab = std::min(a.tokens, kSlab);
    const int64_t sizes[] = {a.tokens * a.hidden(), a.tokens * a.qkv_width(), a.tokens * a.heads * a.head_dim,
                             slab * a.gate_up.out, slab * a.gate_up.out / 2};
    float** const parts[] = {&normalised, &qkv, &attended, &projected, &gated};
    constexpr int64_t kAlign = 16;
    int64_t needed = 0;
    for (const int64_t size : sizes) needed += (size + kAlign - 1) / kAlign * kAlign;
    thread_local std::vector<float> memory;
    if (memory.size() < size_t(needed)) memory.resize(size_t(needed));
    float* next = memory.data();
    for (int i = 0; i < 5; ++i) {
      *parts[i] = next;
      next += (sizes[i] + kAlign - 1) / kAlign * kAlign;
    }
  }

  float *normalised, *qkv, *attended, *projected, *gated;
};

// Adds the bias, norms and rotates queries and keys, and stores keys and values in their places.
void place_rows(const LayerArgs& a, float* qkv, const Rows& key, const Rows& value, const PlaceOf& place_of,
                const ParallelFor& parallel_for) {
  const Kernels& isa = kernels();
  const int64_t width = a.qkv_width();
  parallel_for(a.tokens, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* const row = qkv + t * width;
      for (int64_t i = 0; a.qkv_bias && i < width; ++i) row[i] += a.qkv_bias[i];
      for (int64_t h = 0; h < a.heads; ++h) {
        float* const query = row + h * a.head_dim;
        isa.rotate(a.query_rotary, a.positions[t], query, DType::kFloat32, query, DType::kFloat32);
      }
      Place place;
      if (!place_of(t, &place)) continue;
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const float* const from = row + (a.heads + h) * a.head_dim;
        isa.rotate(a.key_rotary, a.positions[t], from, DType::kFloat32, row_at(key, place.outer, place.middle, h),
                   key.dtype);
        isa.copy(from + a.kv_heads * a.head_dim, DType::kFloat32, row_at(value, place.outer, place.middle, h),
                 value.dtype, a.head_dim);
      }
    }
  });
}

void add_and_normalise(const NormArgs& norm, int64_t rows, const float* input, const float* added, float* sum,
                       float* target, const ParallelFor& parallel_for) {
  const Kernels& isa = kernels();
  parallel_for(rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * norm.width;
      isa.add_and_normalise(norm, input + at, added ? added + at : nullptr, sum + at, target + at);
    }
  });
}

}  // namespace

void run_layer(const LayerArgs& a, const float* input, const float* residual, const Rows& key, const Rows& value,
               const PlaceOf& place_of, const Attend& attend, float* new_residual, float* output,
               const ParallelFor& parallel_for) {
  if (a.tokens == 0) return;
  const Workspace w(a);
  add_and_normalise(a.input_norm, a.tokens, input, residual, new_residual, w.normalised, parallel_for);
  run_linear(a.qkv, w.normalised, a.tokens, w.qkv, parallel_for);
  place_rows(a, w.qkv, key, value, place_of, parallel_for);
  attend({w.qkv, DType::kFloat32, 0, a.qkv_width(), a.head_dim},
         {w.attended, DType::kFloat32, 0, a.heads * a.head_dim, a.head_dim});
  run_linear(a.output, w.attended, a.tokens, output, parallel_for);
  add_and_normalise(a.post_norm, a.tokens, new_residual, output, new_residual, w.normalised, parallel_for);
  for (int64_t row = 0; row < a.tokens; row += kSlab) {
    const int64_t rows = std::min(kSlab, a.tokens - row), at = row * a.hidden();
    run_gated_linear(a.gate_up, w.normalised + at, rows, w.projected, w.gated, parallel_for);
    run_linear(a.down, w.gated, rows, output + at, parallel_for);
  }
}

}  // namespace slipstream
