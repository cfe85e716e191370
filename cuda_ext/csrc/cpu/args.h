// What the CPU kernels are given: plain pointers, sizes and strides, nothing of torch.
//
// This header is included by translation units that are compiled for different instruction sets. It must hold no
// functions: the linker keeps one copy of an inline function, and that copy could be the one with AVX-512 in it.
#pragma once

#include <cstdint>

namespace slipstream {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Rows of `head_dim` contiguous elements; strides are in elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t outer, middle, head;  // [requests, slots, heads], [pages, page_size, heads] or [1, tokens, heads]
};

struct AttentionArgs {
  Rows query, block_key, block_value, key_cache, value_cache, output;
  const int32_t* block_tables;
  int64_t block_table_stride;
  const int32_t* visible;  // [requests, queries], contiguous; of draft slots
  bool causal;             // each query sees one token of context more than the one before it, or all see the same
  int64_t queries;         // the most of a span
  int64_t slots, kv_heads, group, head_dim, page_size;
  float scale;
};

// Queries of one request that are computed together. The last of them sees `context` tokens of context.
struct QuerySpan {
  int64_t request, first, queries, context;
};

// Context tokens that one task reads. Fixed, so that a row's result never depends on what else is computed.
inline constexpr int64_t kChunk = 256;

// Some kv heads of one chunk of one span. The last chunk also takes the draft slots. A task either finishes its
// rows (`partials` is null) or leaves for each of its heads, `partial_stride` floats apart, and for each row of the head
// maximum, sum and `head_dim` unnormalised outputs.
struct AttentionTask {
  QuerySpan span;
  int64_t first_head, heads, chunk;
  bool last;
  float* partials;
  int64_t partial_stride;
};

// How the weights of a linear layer are held. All are widened to float in registers and all arithmetic is float.
//
// Weights lie in panels of kPanel output columns; a panel holds, for each input in turn, one number per column. The
// blocked formats of GGUF put the scales (Q4_1: then the offsets) of a panel's columns as float16 in front of every
// kBlock inputs. Q4_1 shares a byte between two inputs of one column, the first in the low half.
enum class WeightFormat : int32_t { kFloat32, kBFloat16, kFloat16, kInt8, kQ8_0, kQ4_1 };

inline constexpr int64_t kPanel = 16;
inline constexpr int64_t kBlock = 32;

// output[r, n] = sum over k of input[r, k] * weight[n, k], added up in the order of k for every r and n: a row's result
// depends neither on the other rows nor on how many there are.
struct LinearArgs {
  const float* input;
  int64_t input_stride, rows, in;
  const void* panels;
  WeightFormat format;
  const float* scales;  // per column, kInt8 only
  float* output;
  int64_t output_stride, out;
};

struct RotaryArgs {
  const float* norm;   // [head_dim], or null
  float eps;
  const float* table;  // [positions, 2, head_dim]
  int64_t head_dim;
};

struct NormArgs {
  const float* weight;
  float eps;
  int64_t width;
};

struct LikelyArgs {
  const float* logits;
  const float* bias;  // added to them, or null
  int64_t vocab, count;
  float* probabilities;  // [count], falling; what there are too few tokens for is 0
  int64_t* tokens;       // [count], -1 where there are too few
  float* log_sum;        // of all exponentials
};

// The kernels of one instruction set. Row pointers are to `head_dim` contiguous elements.
struct Kernels {
  const char* name;
  int64_t (*scratch_floats)(const AttentionArgs&);  // of a task with all kv heads
  void (*attend)(const AttentionArgs&, const AttentionTask&, float* scratch);
  void (*combine)(const AttentionArgs&, const QuerySpan&, int64_t kv_head, const float* partials, int64_t chunks);
  // Norm and rotate one row from `source` into `target`.
  void (*rotate)(const RotaryArgs&, int64_t position, const void* source, DType from, void* target, DType to);
  void (*copy)(const void* source, DType from, void* target, DType to, int64_t head_dim);
  // sum = row + added, or the row alone where `added` is null; target = the norm of that. `sum` may be `row`.
  void (*add_and_normalise)(const NormArgs&, const float* row, const float* added, float* sum, float* target);
  // target = silu(gate) * up
  void (*gate)(const float* gate, const float* up, float* target, int64_t count);
  // The likeliest tokens of one row of logits; of equal ones those that come first. `scratch` has `vocab` floats.
  void (*likely)(const LikelyArgs&, float* scratch);
  // Columns of panels [first, last) for all rows.
  void (*linear)(const LinearArgs&, int64_t first, int64_t last);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace slipstream
