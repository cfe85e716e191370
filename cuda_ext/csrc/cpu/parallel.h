// How work is handed to threads.
#pragma once

#include <cstdint>
#include <functional>

namespace slipstream {

// Runs body(begin, end) over [0, count) on several threads, at least `grain` items on each.
using ParallelFor = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>&)>;

}  // namespace slipstream
