// Twins of the functions of cuda_ext/csrc/cuda/warp_primitives.cuh, in plain C++ after the PTX manual.
//
// What lanes give each other passes through memory that sanitizers do not watch; what they read from shared memory is
// watched. Rounding is that of the instructions; the order in which a product's terms are added is not specified there,
// and here it is one after the other.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cuda_runtime.h>

#define SLIPSTREAM_DYNAMIC_SHARED(name) unsigned char* const name = host_shim::current_block->shared

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

#if defined(__SANITIZE_THREAD__)
#define HOST_SHIM_UNSEEN __attribute__((noinline, no_sanitize("thread")))
#else
#define HOST_SHIM_UNSEEN
#endif

namespace host_shim {

// Instructions of a warp order nothing in memory, and ThreadSanitizer must not believe that they do: it does not see
// this barrier.
HOST_SHIM_UNSEEN inline void wait_for_warp(Warp& warp) {
  const uint32_t phase = __atomic_load_n(&warp.phase, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&warp.arrived, 1, __ATOMIC_ACQ_REL) == Warp::kLanes) {
    __atomic_store_n(&warp.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&warp.phase, phase + 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &warp.phase, FUTEX_WAKE_PRIVATE, Warp::kLanes, nullptr, nullptr, 0);
    return;
  }
  while (__atomic_load_n(&warp.phase, __ATOMIC_ACQUIRE) == phase) {
    syscall(SYS_futex, &warp.phase, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
  }
}

// Shows `mine` to the other lanes; `all` is valid until this lane's exchange after the next one. Two sets of words take
// turns: whoever writes to a set again has met all others since they read it.
using Words = uint64_t[Warp::kWords];
HOST_SHIM_UNSEEN inline void exchange_words(const uint64_t* mine, int count, uint64_t (*all)[Warp::kWords]) {
  Warp& warp = current_block->warps[threadIdx.x / Warp::kLanes];
  static thread_local unsigned turn = 0;
  Words* const words = warp.words[turn++ % 2];
  for (int i = 0; i < count; ++i) __atomic_store_n(&words[threadIdx.x % Warp::kLanes][i], mine[i], __ATOMIC_RELAXED);
  wait_for_warp(warp);
  for (int lane = 0; lane < Warp::kLanes; ++lane) {
    for (int i = 0; i < count; ++i) all[lane][i] = __atomic_load_n(&words[lane][i], __ATOMIC_RELAXED);
  }
}

inline void check_aligned(const void* pointer, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) fail(what);
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen(uint16_t bits, __nv_bfloat16) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
inline float widen(uint16_t bits, __half) { return static_cast<float>(bits_as<_Float16>(bits)); }

// The 16-bit half of a register that holds element `index` of a pair.
inline uint16_t half_of(uint64_t word, int index) { return static_cast<uint16_t>(word >> index * 16); }

template <typename T>
void multiply_add_16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint64_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint64_t all[Warp::kLanes][Warp::kWords];
  exchange_words(mine, 6, all);
  const int lane = threadIdx.x % Warp::kLanes;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const uint64_t left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint64_t right = all[column * 4 + k % 8 / 2][4 + k / 8];
      c[e] += widen(half_of(left, k % 2), T()) * widen(half_of(right, k % 2), T());
    }
  }
}

// `to[j]` is element pair `second` of row `first` of matrix j, or, transposed, one element each of two rows.
inline void load_8x8(uint32_t (&to)[4], const void* row, bool transposed) {
  check_aligned(row, "ldmatrix from an address that is not a multiple of 16");
  const uint64_t mine[1] = {reinterpret_cast<uint64_t>(row)};
  uint64_t all[Warp::kLanes][Warp::kWords];
  exchange_words(mine, 1, all);
  const int g = threadIdx.x % Warp::kLanes / 4, t = threadIdx.x % 4;
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int from = transposed ? 2 * t + e : g, element = transposed ? g : 2 * t + e;
      std::memcpy(&pair[e], reinterpret_cast<const uint16_t*>(all[j * 8 + from][0]) + element, 2);
    }
    to[j] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

inline uint32_t exchange_bits(uint32_t value, int mask) {
  const uint64_t mine[1] = {value};
  uint64_t all[Warp::kLanes][Warp::kWords];
  exchange_words(mine, 1, all);
  return static_cast<uint32_t>(all[threadIdx.x % Warp::kLanes ^ mask][0]);
}

}  // namespace host_shim

namespace slipstream {
namespace cuda {

inline void copy_now(void* to, const void* from) {
  if (from) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}

inline void copy_async(void* shared, const void* global, bool exists) {
  host_shim::check_aligned(shared, "cp.async to an address that is not a multiple of 16");
  host_shim::check_aligned(global, "cp.async from an address that is not a multiple of 16");
  if (!exists) global = nullptr;
  if (host_shim::device.copies_late) {
    host_shim::pending_copies.push_back({shared, global});
  } else {
    copy_now(shared, global);
  }
}

inline void wait_for_copies() {
  for (const host_shim::PendingCopy& copy : host_shim::pending_copies) copy_now(copy.to, copy.from);
  host_shim::pending_copies.clear();
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { host_shim::load_8x8(to, row, false); }
inline void load_transposed(uint32_t (&to)[4], const void* row) { host_shim::load_8x8(to, row, true); }

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  host_shim::multiply_add_16<T>(c, a, b);
}

inline float as_float(uint32_t bits) { return host_shim::bits_as<float>(bits); }
inline uint32_t as_bits(float x) { return host_shim::bits_as<uint32_t>(x); }

// The instruction ignores the bits that TF32 does not have.
inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint64_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint64_t all[host_shim::Warp::kLanes][host_shim::Warp::kWords];
  host_shim::exchange_words(mine, 6, all);
  const int lane = threadIdx.x % host_shim::Warp::kLanes;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 8; ++k) {
      const uint32_t left = static_cast<uint32_t>(all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]);
      const uint32_t right = static_cast<uint32_t>(all[column * 4 + k % 4][4 + k / 4]);
      c[e] += as_float(left & 0xffffe000u) * as_float(right & 0xffffe000u);
    }
  }
}

// Bits below the tenth of the mantissa are left as garbage, as the manual allows.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) | 0x1fffu;
}

inline uint32_t pack(float low, float high, __nv_bfloat16) {
  return host_shim::round_to_bfloat16(low) | static_cast<uint32_t>(host_shim::round_to_bfloat16(high)) << 16;
}

inline uint32_t pack(float low, float high, __half) {
  const auto rounded = [](float x) { return host_shim::bits_as<uint16_t>(static_cast<_Float16>(x)); };
  return rounded(low) | static_cast<uint32_t>(rounded(high)) << 16;
}

inline float exchange(float value, int mask) { return as_float(host_shim::exchange_bits(as_bits(value), mask)); }
inline int exchange(int value, int mask) {
  return static_cast<int>(host_shim::exchange_bits(static_cast<uint32_t>(value), mask));
}

}  // namespace cuda
}  // namespace slipstream
