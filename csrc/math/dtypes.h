// The 16-bit float formats and their conversions, in integer arithmetic only, for host and device.
//
// Everything with code in it lives in an anonymous namespace: these headers are compiled in several
// translation units with different instruction-set flags, and a shared (weak) symbol would let the
// linker hand AVX-512 code to a CPU without it. bf16 and fp16 have no member functions, so they are
// ordinary types that may appear in a signature shared between translation units.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TT_HD __host__ __device__
#define TT_INLINE __host__ __device__ __forceinline__
#else
#define TT_HD
#define TT_INLINE inline __attribute__((always_inline))
#endif

namespace trimtab {

struct bf16 {
  uint16_t bits;  // sign 1, exponent 8 (bias 127), mantissa 7: the upper half of an fp32
};

struct fp16 {
  uint16_t bits;  // sign 1, exponent 5 (bias 15), mantissa 10
};

namespace {

// The one NaN each narrow format stores; the sign and payload of the fp32 NaN are dropped.
constexpr uint16_t kBf16Nan = 0x7fc0;
constexpr uint16_t kFp16Nan = 0x7e00;

TT_INLINE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

TT_INLINE float float_from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

TT_INLINE float to_float(bf16 h) { return float_from_bits(uint32_t{h.bits} << 16); }

// RNE on the upper half: adding 0x7fff rounds everything above a tie up, the last kept bit sends a
// tie to even. A carry out of the mantissa lands in the exponent, which is the right neighbour (or
// Inf). Subnormals need no special case: they are spaced like the integers of their bits.
TT_INLINE bf16 to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{kBf16Nan};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// NaN: sign and payload are kept and the quiet bit is set, as vcvtph2ps does.
TT_INLINE float to_float(fp16 h) {
  const uint32_t sign = uint32_t{h.bits & 0x8000u} << 16;
  const uint32_t mag = h.bits & 0x7fffu;
  if (mag > 0x7c00u) return float_from_bits(sign | 0x7fc00000u | (mag << 13));
  if (mag == 0x7c00u) return float_from_bits(sign | 0x7f800000u);
  if (mag >= 0x0400u) return float_from_bits(sign | ((mag << 13) + 0x38000000u));  // bias 127 - 15
  // Subnormal: mag * 2^-24. 2^-1 | mag<<13 is 0.5 * (1 + mag * 2^-10), so subtracting 0.5 leaves
  // mag * 2^-11 exactly; lowering a non-zero exponent by 13 makes it mag * 2^-24.
  if (mag == 0) return float_from_bits(sign);
  const float scaled = float_from_bits(0x3f000000u | (mag << 13)) - 0.5f;
  return float_from_bits(sign | (float_bits(scaled) - (13u << 23)));
}

TT_INLINE fp16 to_fp16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return fp16{kFp16Nan};
  if (mag >= 0x47800000u) return fp16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 2^16: Inf
  if (mag >= 0x38800000u) {  // >= 2^-14: normal; 65520 and above carry into Inf by themselves
    const uint32_t h = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
    return fp16{static_cast<uint16_t>(sign | h)};
  }
  const uint32_t exponent = mag >> 23;
  if (exponent < 102u) return fp16{static_cast<uint16_t>(sign)};  // < 2^-25, half the smallest
  const uint32_t mantissa = (mag & 0x7fffffu) | 0x800000u;  // x = mantissa * 2^(exponent-150)
  const uint32_t shift = 126u - exponent;  // to units of 2^-24; 14..24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  const uint32_t up = (rest > half || (rest == half && (kept & 1u))) ? 1u : 0u;
  return fp16{static_cast<uint16_t>(sign | (kept + up))};
}

}  // namespace
}  // namespace trimtab
