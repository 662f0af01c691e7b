// What kernels and launchers of csrc/cuda use of the CUDA runtime, on the SIMT machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// --- a thread's functions

inline void __syncwarp(uint32_t mask = ~0u, SIMT_WHERE) {
  int nothing = 0;
  simt::meet_warp(mask, nothing, [](simt::Operands<int>) {}, "__syncwarp", where);
}

// `width` lanes, a power of two, are one segment; a source beyond it gives the lane's own value.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_WHERE) {
  const unsigned me = simt::self().lane,
                 own = (me & ~unsigned(width - 1)) + unsigned(source & (width - 1));
  struct Operand {
    T in, out;
    unsigned source;
  } mine = {value, value, own};
  simt::meet_warp(
      mask, mine,
      [&](simt::Operands<Operand> all) {
        for (unsigned i = 0; i < 32; ++i) {
          if (all[i] == nullptr) continue;
          if (all[all[i]->source] == nullptr)
            simt::fault(where, "__shfl_sync: lane %u reads lane %u, not in mask %08x", i,
                        all[i]->source, mask);
          all[i]->out = all[all[i]->source]->in;
        }
      },
      "__shfl_sync", where);
  return mine.out;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, SIMT_WHERE) {
  const auto from = [=](unsigned lane) {
    const unsigned source = lane ^ unsigned(bits),
                   next = (lane & ~unsigned(width - 1)) + unsigned(width);
    return source < next ? source : lane;
  };
  return simt::shuffle(mask, value, from, "__shfl_xor_sync", where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_WHERE) {
  const auto from = [=](unsigned lane) {
    return (lane & unsigned(width - 1)) + delta < unsigned(width) ? lane + delta : lane;
  };
  return simt::shuffle(mask, value, from, "__shfl_down_sync", where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_WHERE) {
  const auto from = [=](unsigned lane) {
    return (lane & unsigned(width - 1)) >= delta ? lane - delta : lane;
  };
  return simt::shuffle(mask, value, from, "__shfl_up_sync", where);
}

inline int __any_sync(uint32_t mask, int predicate, SIMT_WHERE) {
  return simt::ballot(mask, predicate != 0, "__any_sync", where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, SIMT_WHERE) {
  return simt::ballot(mask, predicate == 0, "__all_sync", where) == 0;
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_WHERE) {
  return simt::ballot(mask, predicate != 0, "__ballot_sync", where);
}

// Ordinary memory is seen by all at once here; what the fence is for shows in the thread's order alone.
inline void __threadfence() { simt::maybe_yield(); }
inline void __threadfence_block() { simt::maybe_yield(); }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i, byte = unsigned(bytes >> 8 * (s & 7)) & 0xff;
    y |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return y;
}

#define SIMT_MIN_MAX(T)                               \
  constexpr T min(T a, T b) { return a < b ? a : b; } \
  constexpr T max(T a, T b) { return a > b ? a : b; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// --- atomics, on global and shared memory

namespace simt {

template <class T, class Change>
T atomic(T* p, const Change& change, const char* what, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the hardware has");
  check_aligned(p, sizeof(T), what, where);
  if (is_shared(p)) {
    check_shared(p, sizeof(T), where);
  } else {
    check_global(p, sizeof(T), true, where);
  }
  maybe_yield();
  const T old = *p;
  *p = change(old);
  return old;
}

template <class T>
using Same = typename std::enable_if<true, T>::type;  // takes no part in deduction

}  // namespace simt

template <class T>
T atomicAdd(T* p, simt::Same<T> value, SIMT_WHERE) {
  return simt::atomic(p, [=](T old) { return T(old + value); }, "atomicAdd", where);
}
inline int atomicAdd(int* p, int value, SIMT_WHERE) {  // wraps, as the hardware does
  const auto add = [=](int old) { return int(unsigned(old) + unsigned(value)); };
  return simt::atomic(p, add, "atomicAdd", where);
}
template <class T>
T atomicMax(T* p, simt::Same<T> value, SIMT_WHERE) {
  return simt::atomic(p, [=](T old) { return old > value ? old : value; }, "atomicMax", where);
}
template <class T>
T atomicOr(T* p, simt::Same<T> value, SIMT_WHERE) {
  return simt::atomic(p, [=](T old) { return T(old | value); }, "atomicOr", where);
}
template <class T>
T atomicExch(T* p, simt::Same<T> value, SIMT_WHERE) {
  return simt::atomic(p, [=](T) { return value; }, "atomicExch", where);
}
template <class T>
T atomicCAS(T* p, simt::Same<T> expected, simt::Same<T> value, SIMT_WHERE) {
  return simt::atomic(p, [=](T old) { return old == expected ? value : old; }, "atomicCAS", where);
}

// --- a launcher's functions. A stream runs everything at once.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  const simt::Range* range = simt::machine.ranges.find(reinterpret_cast<uintptr_t>(p), bytes);
  if (bytes != 0 && (range == nullptr || !range->writable)) return cudaErrorInvalidValue;
  std::memset(p, value, bytes);
  return cudaSuccess;
}
