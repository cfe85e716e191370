#include "dispatch.h"

#include <atomic>
#include <vector>

namespace slipstream {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&kAvx512Kernels);
  }
  if (avx2) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kScalarKernels);
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::string supported_isas() {
  std::string names;
  for (const Kernels* kernels : supported()) {
    if (!names.empty()) names += ',';
    names += kernels->name;
  }
  return names;
}

bool force_isa(const std::string& name) {
  for (const Kernels* kernels : supported()) {
    if (name.empty() || name == kernels->name) {
      chosen().store(kernels);
      return true;
    }
  }
  return false;
}

}  // namespace slipstream
