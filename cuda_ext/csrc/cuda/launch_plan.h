// Sizes that the kernels, their launcher and the binding of block attention agree on. Plain C++; the compiler of the
// kernels also makes these functions for the device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SLIPSTREAM_HOST_DEVICE __host__ __device__
#else
#define SLIPSTREAM_HOST_DEVICE
#endif

namespace slipstream {
namespace cuda {

inline constexpr int kWarpLanes = 32;
inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / kWarpLanes;
inline constexpr int kWarpRows = 16;  // rows of one matrix instruction
inline constexpr int kBlockRows = kWarps * kWarpRows;
inline constexpr int kRowPadding = 16;  // bytes that keep eight rows of a tile in different banks of shared memory

// The context is split into chunks, and one thread block at a time works on a chunk. Boundaries are fixed positions: a
// row's result must not depend on the batch or on the width of the block table. Chunks grow with the position, so that
// a short context keeps many blocks busy and a long one does not leave a partial result every 256 tokens: a table for
// 131,072 tokens has 49 chunks.
inline constexpr int kFirstChunk = 256;
inline constexpr int kChunksPerSize = 8;  // chunks of a size before the size doubles

SLIPSTREAM_HOST_DEVICE constexpr int64_t chunk_begin(int chunk) {
  const int64_t size = int64_t{kFirstChunk} << (chunk / kChunksPerSize);
  return (size - kFirstChunk) * kChunksPerSize + size * (chunk % kChunksPerSize);
}

// Chunks of a context. At least one: draft slots are part of the last chunk.
SLIPSTREAM_HOST_DEVICE constexpr int chunk_count(int64_t tokens) {
  int chunks = 1;
  while (chunk_begin(chunks) < tokens) ++chunks;
  return chunks;
}

// Context tokens or draft slots that are in shared memory at a time. Small enough for two tiles of keys and two of
// values beside the queries in 99 KiB, what every GPU from compute capability 8.0 on has.
SLIPSTREAM_HOST_DEVICE constexpr int tile_tokens(int row_bytes) {
  return row_bytes <= 384 ? 32 : row_bytes <= 512 ? 16 : 8;
}

// Places in a thread block's shared memory, in bytes.
struct SharedLayout {
  int tokens, stride;     // of a tile; bytes between its rows
  int rows, query;        // pointers to the rows of two tiles; queries
  int key, value, buffer;  // first of two tiles each; bytes between the two
  int bytes;
};

SLIPSTREAM_HOST_DEVICE constexpr SharedLayout shared_layout(int row_bytes) {
  SharedLayout layout{};
  layout.tokens = tile_tokens(row_bytes);
  layout.stride = row_bytes + kRowPadding;
  layout.buffer = layout.tokens * layout.stride;
  layout.rows = 0;
  layout.query = 2 * layout.tokens * 16;
  layout.key = layout.query + kBlockRows * layout.stride;
  layout.value = layout.key + 2 * layout.buffer;
  layout.bytes = layout.value + 2 * layout.buffer;
  return layout;
}

// Sizes of a call.
struct AttentionShape {
  int64_t requests, queries, heads, kv_heads, head_dim;
  int64_t max_pages, page_size;
  int64_t element_size;  // bytes
};

struct LaunchPlan {
  int64_t chunks;           // of the longest context that the block table has room for
  int64_t row_tiles;        // of kBlockRows rows, per request and kv head
  int64_t blocks_x;         // request, kv head and row tile
  int64_t blocks_y;         // chunks are dealt out to these in turn
  int64_t shared_bytes;
  int64_t combine_blocks;   // 0: there is one chunk and nothing to combine
  int64_t scratch_outputs;  // floats: outputs of every row and chunk
  int64_t scratch_floats;   // and then their log-sum-exps
};

inline LaunchPlan plan_launch(const AttentionShape& shape, int64_t multiprocessors) {
  LaunchPlan plan{};
  const int64_t rows = shape.requests * shape.queries * shape.heads;
  const int64_t group_rows = shape.queries * (shape.heads / shape.kv_heads);
  plan.chunks = chunk_count(shape.max_pages * shape.page_size);
  plan.row_tiles = (group_rows + kBlockRows - 1) / kBlockRows;
  plan.blocks_x = shape.requests * shape.kv_heads * plan.row_tiles;
  // Most chunks of a wide table lie behind the contexts. Beyond what fills the GPU several times over, and never below
  // the chunks of one size, blocks go from one chunk to the next instead of starting only to find nothing to do.
  const int64_t enough = plan.blocks_x ? (8 * multiprocessors + plan.blocks_x - 1) / plan.blocks_x : 0;
  plan.blocks_y = enough > kChunksPerSize ? enough : kChunksPerSize;
  if (plan.blocks_y > plan.chunks) plan.blocks_y = plan.chunks;
  plan.shared_bytes = shared_layout(static_cast<int>(shape.head_dim * shape.element_size)).bytes;
  if (plan.chunks > 1) {
    plan.combine_blocks = (rows + kWarps - 1) / kWarps;
    plan.scratch_outputs = rows * plan.chunks * shape.head_dim;
    plan.scratch_floats = plan.scratch_outputs + rows * plan.chunks;
  }
  return plan;
}

// What to allocate; the same on every device.
inline int64_t scratch_floats(const AttentionShape& shape) { return plan_launch(shape, 1).scratch_floats; }

// Blocks in the first dimension of a grid, the largest there is.
inline constexpr int64_t kMostBlocks = 2147483647;

}  // namespace cuda
}  // namespace slipstream
