// Splitting an attention call into tasks and running them.
#pragma once

#include <functional>

#include "args.h"

namespace slipstream {

// Runs body(begin, end) over [0, count) on several threads, at least `grain` items on each.
using ParallelFor = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>&)>;

// Attention of every request on up to `threads` threads; `args.output` is written completely.
void run_block_attention(const AttentionArgs& args, int64_t requests, int64_t threads, const ParallelFor& parallel_for);

}  // namespace slipstream
