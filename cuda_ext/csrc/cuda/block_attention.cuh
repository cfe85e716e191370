// Attention of draft slots over a paged context and their own block; defined by cuda_ext/reference.py.
//
// Two kernels. `attend_chunks` reads keys and values in place, tile by tile through shared memory, once for all
// `queries * heads / kv_heads` rows that share a kv head (up to kBlockRows at a time), with online softmax (Milakov and
// Gimelshein, arXiv 1805.02867) in base two and float32 sums. The context is split into chunks that are worked on in
// parallel (Flash-Decoding); where a row has several, `combine_chunks` weighs their outputs by log-sum-exp, in order.
//
// A row's result depends on its query, on what it sees and on fixed chunk boundaries; nothing else in the batch changes
// a bit of it. Rows of the cache and entries of the block table behind a context, and slots that no query of a request
// sees, are never read. A slot's value that is not finite, however, spoils all queries of its request once
// one of them sees it, as in the definition: a weight of zero does not hide it.
//
// These kernels have never run on a GPU. They compile for one, and tests run this very file on the host, where the
// functions of warp_primitives.cuh are replaced by twins; see there.
#pragma once

#include "block_attention.h"
#include "launch_plan.h"
#include "warp_primitives.cuh"
#include "warp_rows.cuh"

namespace slipstream {
namespace cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

// Where one row of a tile lies; null where there is no row.
struct alignas(16) RowPointers {
  const void* key;
  const void* value;
};

// What one chunk of a request holds: context tokens [begin, end), and in the last chunk draft slots [0, slots).
struct Span {
  int begin, end, slots;
  int context_tiles, tiles;
};

// A thread block's rows of one request and kv head, and its way through their chunks.
template <typename T, int kHeadDim>
struct AttentionBlock {
  using Warp = WarpRows<T, kHeadDim>;
  static constexpr SharedLayout kLayout = Warp::kLayout;
  static constexpr int kTokens = kLayout.tokens;
  static constexpr int kVectors = kHeadDim * sizeof(T) / 16;  // 16-byte pieces of a row
  static_assert(kTokens <= kThreads, "one thread locates a row");

  const BlockAttentionParams& p;
  unsigned char* const shared;
  const int thread, lane, warp, group;
  int request, kv_head, first_row, rows;  // rows: query * group + head of the group
  int context, chunks;

  __device__ __forceinline__ AttentionBlock(const BlockAttentionParams& params, unsigned char* shared_memory)
      : p(params), shared(shared_memory), thread(threadIdx.x), lane(thread % kWarpLanes), warp(thread / kWarpLanes),
        group(p.heads / p.kv_heads) {
    const int group_rows = p.queries * group, tiles = (group_rows + kBlockRows - 1) / kBlockRows;
    const int index = blockIdx.x;
    request = index / tiles / p.kv_heads;
    kv_head = index / tiles % p.kv_heads;
    first_row = index % tiles * kBlockRows;
    rows = min(group_rows - first_row, kBlockRows);
    // A context that the block table has no room for would be read from beyond its end.
    const int64_t room = static_cast<int64_t>(p.max_pages) * p.page_size;
    context = static_cast<int>(min(static_cast<int64_t>(max(p.context_lens[request], 0)), room));
    chunks = chunk_count(context);
  }

  __device__ __forceinline__ int query_of(int row) const { return (first_row + row) / group; }

  __device__ __forceinline__ int head_of(int row) const { return kv_head * group + (first_row + row) % group; }

  // Slots that a row sees.
  __device__ __forceinline__ int seen_by(int row) const {
    return row < rows ? min(p.visible[request * p.visible_stride + query_of(row)], p.slots) : 0;
  }

  // Slots that any row of this block sees.
  __device__ __forceinline__ int seen_by_any() const {
    int seen = max(seen_by(lane), seen_by(lane + kWarpLanes));
#pragma unroll
    for (int mask = 1; mask < kWarpLanes; mask *= 2) seen = max(seen, exchange(seen, mask));
    return seen;
  }

  __device__ __forceinline__ Span span_of(int chunk) const {
    Span span;
    span.begin = static_cast<int>(min(chunk_begin(chunk), static_cast<int64_t>(context)));
    span.end = static_cast<int>(min(chunk_begin(chunk + 1), static_cast<int64_t>(context)));
    span.slots = chunk + 1 == chunks ? seen_by_any() : 0;
    span.context_tiles = (span.end - span.begin + kTokens - 1) / kTokens;
    span.tiles = span.context_tiles + (span.slots + kTokens - 1) / kTokens;
    return span;
  }

  static __device__ __forceinline__ const void* row_of(const Rows& rows, int outer, int middle, int head) {
    return static_cast<const T*>(rows.data) + outer * rows.outer + middle * rows.middle + head * rows.head;
  }

  __device__ __forceinline__ RowPointers* pointers(int tile) const {
    return reinterpret_cast<RowPointers*>(shared + kLayout.rows) + tile % 2 * kTokens;
  }

  __device__ __forceinline__ unsigned char* keys(int tile) const {
    return shared + kLayout.key + tile % 2 * kLayout.buffer;
  }

  __device__ __forceinline__ unsigned char* values(int tile) const {
    return shared + kLayout.value + tile % 2 * kLayout.buffer;
  }

  // Notes where the rows of a tile lie: one row per thread, so that each page is looked up once.
  __device__ __forceinline__ void locate(const Span& span, int tile) const {
    if (thread >= kTokens || tile >= span.tiles) return;
    RowPointers found{nullptr, nullptr};
    if (tile < span.context_tiles) {
      const int token = span.begin + tile * kTokens + thread;
      if (token < span.end) {
        const int page = p.block_tables[request * p.block_tables_stride + token / p.page_size];
        const int offset = token % p.page_size;
        found = {row_of(p.key_cache, page, offset, kv_head), row_of(p.value_cache, page, offset, kv_head)};
      }
    } else {
      const int slot = (tile - span.context_tiles) * kTokens + thread;
      if (slot < span.slots) {
        found = {row_of(p.block_key, request, slot, kv_head), row_of(p.block_value, request, slot, kv_head)};
      }
    }
    pointers(tile)[thread] = found;
  }

  // Starts copying a tile whose rows have been located.
  __device__ __forceinline__ void fetch(const Span& span, int tile) const {
    if (tile >= span.tiles) return;
#pragma unroll 2
    for (int i = thread; i < kTokens * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * 16;
      const RowPointers from = pointers(tile)[row];
      copy_row_part(keys(tile) + row * kLayout.stride + column, from.key, column);
      copy_row_part(values(tile) + row * kLayout.stride + column, from.value, column);
    }
  }

  __device__ __forceinline__ void fetch_query() const {
#pragma unroll 1
    for (int i = thread; i < kBlockRows * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * 16;
      const void* const from = row < rows ? row_of(p.query, request, query_of(row), head_of(row)) : nullptr;
      copy_row_part(shared + kLayout.query + row * kLayout.stride + column, from, column);
    }
  }

  __device__ __forceinline__ void copy_row_part(unsigned char* to, const void* row, int column) const {
    const bool exists = row != nullptr;
    copy_async(to, exists ? static_cast<const unsigned char*>(row) + column : p.query.data, exists);
  }

  __device__ __forceinline__ void run() const {
    if (static_cast<int>(blockIdx.y) >= chunks) return;
    const int warp_row = warp * kWarpRows, row = warp_row + lane / 4;
    const int seen[2] = {seen_by(row), seen_by(row + 8)};
    const float scale = p.scale * kLog2E;
    fetch_query();
    Warp state;
    for (int chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y) {
      const Span span = span_of(chunk);
      locate(span, 0);
      locate(span, 1);
      state.clear();
      __syncthreads();  // the first rows are located
      fetch(span, 0);
      for (int tile = 0; tile < span.tiles; ++tile) {
        wait_for_copies();
        __syncthreads();  // this tile and the next tile's rows are there; the other buffers are no longer read
        fetch(span, tile + 1);
        locate(span, tile + 2);
        if (warp_row >= rows) continue;
        const int first = (tile < span.context_tiles ? tile : tile - span.context_tiles) * kTokens;
        const bool slots = tile >= span.context_tiles;
        const int left = span.end - span.begin - first;
        const int limit[2] = {slots ? seen[0] - first : left, slots ? seen[1] - first : left};
        state.attend(shared + kLayout.query + warp_row * kLayout.stride, keys(tile), values(tile), limit, scale, lane);
      }
      if (warp_row < rows) finish(state, chunk, row);
    }
    wait_for_copies();
  }

  // Stores both rows of this lane: results where there is one chunk, outputs and log-sum-exps for `combine_chunks`
  // elsewhere.
  __device__ __forceinline__ void finish(const Warp& state, int chunk, int first) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(state.sum[half]);
      const int row = first + half * 8;
      if (row >= rows) continue;
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int64_t query = static_cast<int64_t>(request) * p.queries + query_of(row);
      const int64_t result = query * p.heads + head_of(row);
      const int64_t partial = result * p.chunks + chunk;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const int column = i * 8 + lane % 4 * 2;
        const float left = state.output[i][half * 2] * factor, right = state.output[i][half * 2 + 1] * factor;
        if (chunks == 1) {
          Matrices<T>::store(p.output, result * kHeadDim + column, left, right);
        } else {
          Matrices<float>::store(p.scratch, partial * kHeadDim + column, left, right);
        }
      }
      if (chunks > 1 && lane % 4 == 0) {
        p.scratch[p.scratch_outputs + partial] = sum == 0.0f ? kMinusInfinity : state.maximum[half] + log2f(sum);
      }
    }
  }
};

// Thread blocks that registers are to leave room for on a multiprocessor. The wider the rows, the more their sums take.
template <typename T, int kHeadDim>
inline constexpr int kBlocksPerMultiprocessor = sizeof(T) == 4 || kHeadDim > 128 ? 2 : kHeadDim > 96 ? 3 : 4;

// Grid: [requests * kv_heads * row tiles, any number of blocks that share the chunks].
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T, kHeadDim>)
    attend_chunks(const __grid_constant__ BlockAttentionParams p) {
  SLIPSTREAM_DYNAMIC_SHARED(shared);
  AttentionBlock<T, kHeadDim>(p, shared).run();
}

// One warp per row; rows with a single chunk have their result already.
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_chunks(const __grid_constant__ BlockAttentionParams p) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
  const int64_t rows_per_request = static_cast<int64_t>(p.queries) * p.heads;
  if (row >= p.requests * rows_per_request) return;
  const int64_t room = static_cast<int64_t>(p.max_pages) * p.page_size;
  const int64_t context = max(p.context_lens[row / rows_per_request], 0);
  const int chunks = chunk_count(min(context, room));
  if (chunks == 1) return;
  const float* const outputs = p.scratch + row * p.chunks * p.head_dim;
  const float* const log_sums = p.scratch + p.scratch_outputs + row * p.chunks;
  float largest = kMinusInfinity;
  for (int chunk = 0; chunk < chunks; ++chunk) largest = fmaxf(largest, log_sums[chunk]);
  const float base = largest == kMinusInfinity ? 0.0f : largest;
  for (int column = lane * 2; column < p.head_dim; column += kWarpLanes * 2) {
    float total = 0.0f, left = 0.0f, right = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const float weight = exp2f(log_sums[chunk] - base);
      const float2 part = *reinterpret_cast<const float2*>(outputs + chunk * p.head_dim + column);
      total += weight;
      left += weight * part.x;
      right += weight * part.y;
    }
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    Matrices<T>::store(p.output, row * p.head_dim + column, left * factor, right * factor);
  }
}

}  // namespace cuda
}  // namespace slipstream
