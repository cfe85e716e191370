// Attention of new tokens or draft slots over a paged context, and over their own block, for one instruction set.
//
// A task is some kv heads of one span and at most kChunk tokens of context. It reads each key and value once, tile by
// tile and in place, for all `queries * group` rows that share a kv head, with online softmax (Milakov and
// Gimelshein, arXiv 1805.02867) in base two. Rows never mix: a row's result depends on its query, on what it sees and
// on the fixed chunk boundaries, and on nothing else in the batch.
//
// Scores want keys along the lanes, so a tile of keys is transposed first; outputs want the head dimension along the
// lanes, as values lie in memory.
#pragma once

#include "simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

static constexpr int kTile = 32;  // keys of a tile: its keys, values and weights stay in the first-level cache
static constexpr int kTileVectors = kTile / kWidth;
static constexpr int kScoreVectors = 2;  // of them, those whose sums are held in registers at once, times kRowBlock
static constexpr int kRowBlock = 5;
static constexpr float kMinusInfinity = -__builtin_inff();

#if defined(__AVX512F__)
static constexpr int kValueVectors = 4;  // the same for sums over values
#else
static constexpr int kValueVectors = 2;
#endif

SLIPSTREAM_INLINE int64_t padded(int64_t head_dim) { return (head_dim + kWidth - 1) / kWidth * kWidth; }

// Parts of a task's scratch memory.
struct Workspace {
  float* query;    // [heads, rows, padded], scaled
  float* keys;     // [padded, kTile], transposed
  float* values;   // [kTile, padded], only for values that cannot be read in place
  float* weights;  // [rows, kTile], scores, then unnormalised probabilities
  float* output;   // [heads, rows, padded]
  float* sum;      // [heads, rows, kWidth], lane by lane
  float* maximum;  // [heads, rows]
};

static int64_t lay_out(const AttentionArgs& a, float* scratch, Workspace* w) {
  const int64_t rows = a.queries * a.group, all = a.kv_heads * rows, width = padded(a.head_dim);
  const int64_t sizes[] = {all * width, width * kTile, kTile * width, rows * kTile, all * width, all * kWidth, all};
  float** const parts[] = {&w->query, &w->keys, &w->values, &w->weights, &w->output, &w->sum, &w->maximum};
  int64_t used = 0;
  for (int i = 0; i < 7; ++i) {
    if (scratch) *parts[i] = scratch + used;
    used += (sizes[i] + 15) / 16 * 16;
  }
  return used;
}

// The part of the workspace that belongs to one of the task's heads.
SLIPSTREAM_INLINE Workspace of_head(const AttentionArgs& a, const Workspace& w, int64_t head) {
  const int64_t first = head * a.queries * a.group, width = padded(a.head_dim);
  Workspace part = w;
  part.query += first * width;
  part.output += first * width;
  part.sum += first * kWidth;
  part.maximum += first;
  return part;
}

static int64_t scratch_floats(const AttentionArgs& a) {
  Workspace unused;
  return lay_out(a, nullptr, &unused);
}

// keys[d, j] = row j's element d; rows past `count` are zeros.
template <DType dtype>
static void transpose_keys(const char* const* rows, int64_t count, int64_t head_dim, float* keys) {
  const Vec zero = broadcast(0.0f);
  if (head_dim % kWidth == 0) {
    for (int64_t j = 0; j < kTile; j += kWidth) {
      for (int64_t d = 0; d < head_dim; d += kWidth) {
        Vec block[kWidth];
        for (int i = 0; i < kWidth; ++i) block[i] = j + i < count ? load_as_float<dtype>(rows[j + i], d) : zero;
        store_transposed(block, keys + d * kTile + j, kTile);
      }
    }
    return;
  }
  for (int64_t j = 0; j < kTile; ++j) {
    float row[256 + kWidth] = {};
    if (j < count) load_row(rows[j], dtype, row, head_dim);
    for (int64_t d = 0; d < head_dim; ++d) keys[d * kTile + j] = row[d];
  }
}

// Values as float rows of `padded` elements: where they are, or copied to `copies`.
template <DType dtype>
static void place_values(const char* const* rows, int64_t count, int64_t head_dim, float* copies, const float** placed) {
  if (dtype == DType::kFloat32 && head_dim % kWidth == 0) {
    for (int64_t j = 0; j < count; ++j) placed[j] = reinterpret_cast<const float*>(rows[j]);
    return;
  }
  const int64_t width = padded(head_dim);
  for (int64_t j = 0; j < count; ++j) {
    float* const copy = copies + j * width;
    if (head_dim % kWidth == 0) {
      for (int64_t d = 0; d < head_dim; d += kWidth) store(copy + d, load_as_float<dtype>(rows[j], d));
    } else {
      for (int64_t d = head_dim; d < width; ++d) copy[d] = 0.0f;
      load_row(rows[j], dtype, copy, head_dim);
    }
    placed[j] = copy;
  }
}

template <int kRows>
SLIPSTREAM_INLINE void score_rows(const float* query, int64_t width, int64_t head_dim, const float* keys, float* scores) {
  for (int at = 0; at < kTile; at += kScoreVectors * kWidth) {
    Vec sums[kRows][kScoreVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      Vec key[kScoreVectors];
      for (int v = 0; v < kScoreVectors; ++v) key[v] = load(keys + d * kTile + at + v * kWidth);
      for (int r = 0; r < kRows; ++r) {
        const Vec q = broadcast(query[r * width + d]);
        for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = fma(q, key[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kScoreVectors; ++v) store(scores + r * kTile + at + v * kWidth, sums[r][v]);
    }
  }
}

// Turns a row's scores into weights and rescales what was gathered under a smaller maximum. Scores from `count` on do
// not exist.
SLIPSTREAM_INLINE void update_row(const Workspace& w, int64_t row, int64_t width, int64_t count) {
  float* const weights = w.weights + row * kTile;
  for (int64_t j = count; j < kTile; ++j) weights[j] = kMinusInfinity;
  Vec scores[kTileVectors], best = load(weights);
  for (int v = 0; v < kTileVectors; ++v) {
    scores[v] = load(weights + v * kWidth);
    best = max(best, scores[v]);
  }
  const float tile_maximum = reduce_max(best);
  if (!(tile_maximum > kMinusInfinity)) {  // sees nothing here
    for (int v = 0; v < kTileVectors; ++v) store(weights + v * kWidth, broadcast(0.0f));
    return;
  }
  float* const sum = w.sum + row * kWidth;
  if (tile_maximum > w.maximum[row]) {
    const Vec factor = broadcast(exp2(w.maximum[row] - tile_maximum));
    float* const output = w.output + row * width;
    for (int64_t d = 0; d < width; d += kWidth) store(output + d, mul(load(output + d), factor));
    store(sum, mul(load(sum), factor));
    w.maximum[row] = tile_maximum;
  }
  const Vec maximum = broadcast(w.maximum[row]);
  Vec total = load(sum);
  for (int v = 0; v < kTileVectors; ++v) {
    const Vec weight = exp2(sub(scores[v], maximum));
    store(weights + v * kWidth, weight);
    total = add(total, weight);
  }
  store(sum, total);
}

template <int kRows, int kVectors>
SLIPSTREAM_INLINE void gather_values(
    const float* weights, const float* const* values, int64_t count, int64_t d, float* output, int64_t width) {
  Vec sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(output + r * width + d + v * kWidth);
  }
  for (int64_t j = 0; j < count; ++j) {
    Vec value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load(values[j] + d + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * kTile + j]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(output + r * width + d + v * kWidth, sums[r][v]);
  }
}

template <int kRows>
static void add_values(const Workspace& w, int64_t row, const float* const* values, int64_t count, int64_t width) {
  const float* const weights = w.weights + row * kTile;
  float* const output = w.output + row * width;
  int64_t d = 0;
  constexpr int64_t kStep = kValueVectors * kWidth;
  for (; d + kStep <= width; d += kStep) gather_values<kRows, kValueVectors>(weights, values, count, d, output, width);
  for (; d < width; d += kWidth) gather_values<kRows, 1>(weights, values, count, d, output, width);
}

// What the rows of a span see of a tile that has `count` keys: `seen` by the first query, and `step` more with each.
struct Sight {
  int64_t count, seen, step;

  int64_t of_row(int64_t row, int64_t group) const {
    const int64_t keys = step ? seen + row / group * step : seen;
    return keys < 0 ? 0 : keys < count ? keys : count;
  }
};

// `count` keys exist; a row that sees fewer of them gives the others no weight, which changes nothing in its sums.
template <int kRows>
static void attend_rows(
    const AttentionArgs& a, const Workspace& w, int64_t row, const float* const* values, const Sight& sight) {
  const int64_t width = padded(a.head_dim);
  score_rows<kRows>(w.query + row * width, width, a.head_dim, w.keys, w.weights + row * kTile);
  for (int r = 0; r < kRows; ++r) update_row(w, row + r, width, sight.of_row(row + r, a.group));
  add_values<kRows>(w, row, values, sight.count, width);
}

// All rows that see something of a tile; which rows share a register block changes nothing in any of them.
static void attend_tile(
    const AttentionArgs& a, const Workspace& w, int64_t queries, const float* const* values, const Sight& sight) {
  const int64_t rows = queries * a.group;
  int64_t row = 0;
  if (sight.step > 0 && sight.seen <= 0) row = (1 - sight.seen) * a.group;
  for (; row + kRowBlock <= rows; row += kRowBlock) attend_rows<kRowBlock>(a, w, row, values, sight);
  for (; row + 2 <= rows; row += 2) attend_rows<2>(a, w, row, values, sight);
  if (row < rows) attend_rows<1>(a, w, row, values, sight);
}

// Asks for rows of several heads, which lie side by side.
SLIPSTREAM_INLINE void prefetch_rows(const char* const* rows, int64_t count, int64_t bytes) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows[j] + at, 0, 2);
  }
}

// The chunk's context tokens up to `end`.
template <DType dtype>
static void attend_context(const AttentionArgs& a, const AttentionTask& t, const Workspace& w, int64_t end) {
  constexpr int64_t kSize = dtype == DType::kFloat32 ? 4 : 2;
  const char* keys[kChunk];
  const char* values[kChunk];
  const int32_t* const table = a.block_tables + t.span.request * a.block_table_stride;
  const int64_t begin = t.chunk * kChunk, total = end - begin;
  for (int64_t j = 0, page = begin / a.page_size, offset = begin % a.page_size; j < total; ++page, offset = 0) {
    for (; offset < a.page_size && j < total; ++offset, ++j) {
      keys[j] = row_at(a.key_cache, table[page], offset, t.first_head);
      values[j] = row_at(a.value_cache, table[page], offset, t.first_head);
    }
  }
  const int64_t key_bytes = ((t.heads - 1) * a.key_cache.head + a.head_dim) * kSize;
  const int64_t value_bytes = ((t.heads - 1) * a.value_cache.head + a.head_dim) * kSize;
  const int64_t step = a.causal ? 1 : 0, seen_first = t.span.context - (t.span.queries - 1) * step - begin;
  for (int64_t tile = 0; tile < total; tile += kTile) {
    const int64_t count = total - tile < kTile ? total - tile : kTile;
    const Sight sight{count, seen_first - tile, step};
    const int64_t left = total - tile - count, upcoming = left < kTile ? left : kTile;
    for (int64_t h = 0; h < t.heads; ++h) {
      const char* key_rows[kTile];
      const char* value_rows[kTile];
      const float* placed[kTile];
      for (int64_t j = 0; j < count; ++j) {
        key_rows[j] = keys[tile + j] + h * a.key_cache.head * kSize;
        value_rows[j] = values[tile + j] + h * a.value_cache.head * kSize;
      }
      transpose_keys<dtype>(key_rows, count, a.head_dim, w.keys);
      place_values<dtype>(value_rows, count, a.head_dim, w.values, placed);
      // A part of the next tile's rows with each head: a burst of requests would stall the core.
      const int64_t from = h * upcoming / t.heads, to = (h + 1) * upcoming / t.heads;
      prefetch_rows(keys + tile + count + from, to - from, key_bytes);
      prefetch_rows(values + tile + count + from, to - from, value_bytes);
      attend_tile(a, of_head(a, w, h), t.span.queries, placed, sight);
    }
  }
}

// The draft slots of a request's block: each row sees its own number of them, and what it does not see may hold
// anything.
template <DType dtype>
static void attend_block(const AttentionArgs& a, const AttentionTask& t, const Workspace& w, int64_t head) {
  for (int64_t tile = 0; tile < a.slots; tile += kTile) {
    const int64_t count = a.slots - tile < kTile ? a.slots - tile : kTile;
    const char* keys[kTile];
    const char* values[kTile];
    const float* placed[kTile];
    for (int64_t j = 0; j < count; ++j) {
      keys[j] = row_at(a.block_key, t.span.request, tile + j, t.first_head + head);
      values[j] = row_at(a.block_value, t.span.request, tile + j, t.first_head + head);
    }
    transpose_keys<dtype>(keys, count, a.head_dim, w.keys);
    place_values<dtype>(values, count, a.head_dim, w.values, placed);
    for (int64_t q = 0; q < t.span.queries; ++q) {
      const int64_t seen = a.visible[t.span.request * a.queries + q] - tile;
      const Sight sight{seen < count ? seen : count, seen, 0};
      if (seen <= 0) continue;
      for (int64_t row = q * a.group; row < (q + 1) * a.group; ++row) attend_rows<1>(a, w, row, placed, sight);
    }
  }
}

static void attend_block(const AttentionArgs& a, const AttentionTask& t, const Workspace& w, int64_t head) {
  switch (a.block_key.dtype) {
    case DType::kFloat32: attend_block<DType::kFloat32>(a, t, w, head); break;
    case DType::kBFloat16: attend_block<DType::kBFloat16>(a, t, w, head); break;
    case DType::kFloat16: attend_block<DType::kFloat16>(a, t, w, head); break;
  }
}

static void prepare(const AttentionArgs& a, const AttentionTask& t, const Workspace& w, int64_t head) {
  const int64_t width = padded(a.head_dim);
  const float scale = a.scale * 1.44269504088896340736f;  // scores in base two
  for (int64_t row = 0; row < t.span.queries * a.group; ++row) {
    const int64_t query_head = (t.first_head + head) * a.group + row % a.group;
    float* const query = w.query + row * width;
    const char* const from = row_at(a.query, t.span.request, t.span.first + row / a.group, query_head);
    load_row(from, a.query.dtype, query, a.head_dim);
    for (int64_t d = 0; d < a.head_dim; ++d) query[d] *= scale;
    for (int64_t d = 0; d < width; ++d) w.output[row * width + d] = 0.0f;
    for (int i = 0; i < kWidth; ++i) w.sum[row * kWidth + i] = 0.0f;
    w.maximum[row] = kMinusInfinity;
  }
}

// Divides by the sum of the weights; a row that saw nothing has none and gets zeros.
SLIPSTREAM_INLINE void finish_row(
    const AttentionArgs& a, const QuerySpan& span, int64_t kv_head, int64_t row, float* output, float sum) {
  const Vec divisor = broadcast(sum > 0.0f ? sum : 1.0f);
  float result[256 + kWidth];
  for (int64_t d = 0; d < a.head_dim; d += kWidth) store(result + d, div(load(output + d), divisor));
  char* const target = row_at(a.output, span.request, span.first + row / a.group, kv_head * a.group + row % a.group);
  store_row(result, target, a.output.dtype, a.head_dim);
}

static void finish(const AttentionArgs& a, const AttentionTask& t, const Workspace& w, int64_t head) {
  const int64_t width = padded(a.head_dim);
  for (int64_t row = 0; row < t.span.queries * a.group; ++row) {
    const float sum = reduce_add(load(w.sum + row * kWidth));
    float* const output = w.output + row * width;
    if (!t.partials) {
      finish_row(a, t.span, t.first_head + head, row, output, sum);
      continue;
    }
    float* const partial = t.partials + head * t.partial_stride + row * (2 + a.head_dim);
    partial[0] = w.maximum[row];
    partial[1] = sum;
    for (int64_t d = 0; d < a.head_dim; ++d) partial[2 + d] = output[d];
  }
}

static void attend(const AttentionArgs& a, const AttentionTask& t, float* scratch) {
  Workspace w;
  lay_out(a, scratch, &w);
  for (int64_t head = 0; head < t.heads; ++head) prepare(a, t, of_head(a, w, head), head);
  const int64_t limit = (t.chunk + 1) * kChunk;
  const int64_t end = t.span.context < limit ? t.span.context : limit;
  switch (a.key_cache.dtype) {
    case DType::kFloat32: attend_context<DType::kFloat32>(a, t, w, end); break;
    case DType::kBFloat16: attend_context<DType::kBFloat16>(a, t, w, end); break;
    case DType::kFloat16: attend_context<DType::kFloat16>(a, t, w, end); break;
  }
  for (int64_t head = 0; head < t.heads; ++head) {
    if (t.last) attend_block(a, t, of_head(a, w, head), head);
    finish(a, t, of_head(a, w, head), head);
  }
}

// Adds up the chunks of one kv head in order. `partials` is [chunks, rows, 2 + head_dim].
static void combine(
    const AttentionArgs& a, const QuerySpan& span, int64_t kv_head, const float* partials, int64_t chunks) {
  const int64_t rows = span.queries * a.group, stride = 2 + a.head_dim;
  for (int64_t row = 0; row < rows; ++row) {
    float maximum = kMinusInfinity, sum = 0.0f, output[256 + kWidth] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const float chunk_maximum = partials[(c * rows + row) * stride];
      maximum = chunk_maximum > maximum ? chunk_maximum : maximum;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      const float* const partial = partials + (c * rows + row) * stride;
      if (!(partial[0] > kMinusInfinity)) continue;
      const float factor = exp2(partial[0] - maximum);
      sum += factor * partial[1];
      for (int64_t d = 0; d < a.head_dim; ++d) output[d] += factor * partial[2 + d];
    }
    finish_row(a, span, kv_head, row, output, sum);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
