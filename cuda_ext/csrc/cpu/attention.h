// Splitting an attention call into tasks and running them.
#pragma once

#include <vector>

#include "args.h"
#include "parallel.h"

namespace slipstream {

// Attention of all spans on up to `threads` threads; the rows of `args.output` that belong to them are written.
void run_attention(
    const AttentionArgs& args, const std::vector<QuerySpan>& spans, int64_t threads, const ParallelFor& parallel_for);

}  // namespace slipstream
