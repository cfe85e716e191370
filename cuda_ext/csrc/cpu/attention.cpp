#include "attention.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace slipstream {
namespace {

// Below this many keys on each thread, waking another one costs more than it brings.
constexpr int64_t kKeysPerThread = 128;
constexpr int64_t kCombinationsPerThread = 8;

struct Combination {
  QuerySpan span;
  int64_t kv_head, chunks;
  const float* partials;
};

struct Plan {
  std::vector<AttentionTask> tasks;
  std::vector<Combination> combinations;
};

int64_t chunks_of(const QuerySpan& span) { return std::max<int64_t>(1, (span.context + kChunk - 1) / kChunk); }

// Heads of a chunk lie side by side in the pages, so a task takes all of them, unless that left threads without work.
// It changes nothing in the results. `partials` grows as needed and keeps its memory for the next call: fresh pages
// from the system cost more than the arithmetic done in them.
Plan make_plan(const AttentionArgs& args, const std::vector<QuerySpan>& spans, int64_t threads,
               std::vector<float>& partials) {
  const auto partial_of = [&](const QuerySpan& span) { return span.queries * args.group * (2 + args.head_dim); };
  int64_t all_chunks = 0, floats = 0;
  for (const QuerySpan& span : spans) {
    const int64_t chunks = chunks_of(span);
    all_chunks += chunks;
    floats += chunks > 1 ? chunks * args.kv_heads * partial_of(span) : 0;
  }
  const int64_t heads = all_chunks >= 2 * threads ? args.kv_heads : 1;
  Plan plan;
  plan.tasks.reserve(size_t(all_chunks * args.kv_heads / heads));
  if (partials.size() < size_t(floats)) partials.resize(size_t(floats));
  float* next = partials.data();
  for (const QuerySpan& span : spans) {
    const int64_t chunks = chunks_of(span), partial = partial_of(span), stride = chunks * partial;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t head = 0; head < args.kv_heads; head += heads) {
        float* const place = chunks > 1 ? next + head * stride + chunk * partial : nullptr;
        plan.tasks.push_back({span, head, heads, chunk, chunk == chunks - 1, place, stride});
      }
    }
    if (chunks == 1) continue;
    for (int64_t head = 0; head < args.kv_heads; ++head) {
      plan.combinations.push_back({span, head, chunks, next + head * stride});
    }
    next += args.kv_heads * stride;
  }
  return plan;
}

float* scratch_of_this_thread(int64_t floats) {
  constexpr int64_t kAlignment = 64;
  thread_local std::vector<float> memory;
  const size_t needed = size_t(floats + kAlignment / int64_t(sizeof(float)));
  if (memory.size() < needed) memory.resize(needed);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace

void run_attention(
    const AttentionArgs& args, const std::vector<QuerySpan>& spans, int64_t threads, const ParallelFor& parallel_for) {
  const Kernels& isa = kernels();
  thread_local std::vector<float> partials;
  const Plan plan = make_plan(args, spans, threads, partials);
  int64_t keys = 0;
  for (const QuerySpan& span : spans) keys += (span.context + args.slots) * args.kv_heads;
  const int64_t tasks = int64_t(plan.tasks.size());
  const int64_t grain = std::max<int64_t>(1, tasks * kKeysPerThread / std::max<int64_t>(keys, 1));
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    float* const scratch = scratch_of_this_thread(isa.scratch_floats(args));
    for (int64_t i = begin; i < end; ++i) isa.attend(args, plan.tasks[size_t(i)], scratch);
  });
  const int64_t combinations = int64_t(plan.combinations.size());
  parallel_for(combinations, kCombinationsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Combination& c = plan.combinations[size_t(i)];
      isa.combine(args, c.span, c.kv_head, c.partials, c.chunks);
    }
  });
}

}  // namespace slipstream
