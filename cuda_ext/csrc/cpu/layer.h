// A whole decoder layer: norm, attention, norm and gated feed-forward network, with the residual stream between them.
#pragma once

#include <functional>

#include "args.h"
#include "linear_call.h"
#include "parallel.h"

namespace slipstream {

struct LayerArgs {
  int64_t tokens, heads, kv_heads, head_dim;
  NormArgs input_norm, post_norm;
  LayerWeight qkv, output, gate_up, down;
  const float* qkv_bias;  // or null
  RotaryArgs query_rotary, key_rotary;
  const int64_t* positions;  // [tokens]

  int64_t hidden() const { return input_norm.width; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Where keys and values of the layer's tokens go: row (outer, middle) of both for token t.
struct Place {
  int64_t outer, middle;
};
using PlaceOf = std::function<bool(int64_t token, Place* place)>;  // false: nowhere

// Attention from queries [1, tokens, heads, head_dim] to rows of the same shape.
using Attend = std::function<void(const Rows& query, const Rows& output)>;

// One layer for rows [tokens, hidden] of `input`, to which `residual` is added first unless it is null. The residual
// stream behind attention goes to `new_residual` and what the feed-forward network adds to it to `output`.
void run_layer(const LayerArgs& args, const float* input, const float* residual, const Rows& key, const Rows& value,
               const PlaceOf& place_of, const Attend& attend, float* new_residual, float* output,
               const ParallelFor& parallel_for);

}  // namespace slipstream
