// F32x1: one float, host and device, with the interface of F32x8 and F32x16 (csrc/cpu), so that one
// template runs as a scalar loop, as a CUDA thread, on AVX2 and on AVX-512, with the same bits.
//
// The contract of the interface, for all three types:
//   + - * /      round once, to nearest even, subnormals kept; never contracted to fma. Host files
//                are compiled with -ffp-contract=off; on CUDA the _rn intrinsics forbid it.
//   < <= > >= == ordered: false when an operand is NaN
//   min(a, b) = a < b ? a : b     the second operand when either is NaN or both are equal, as minps
//   max(a, b) = a > b ? a : b     the same; so max(c, x) and min(c, x) let a NaN in x through
//   mul_add_exact(a, b, c) = a * b + c,  mul_sub_exact(a, b, c) = a * b - c
//                where the caller knows that a * b is exact, so that fusing changes no bit; one fma
//                where the target has it
//   fma(a, b, c)   a * b + c, rounded once; where a formula says so and nowhere else
//   rint, floor, ceil   to an integral float; -0.0 stays -0.0
//   scale2n(x,n) x * 2^n, exact: n integral in [-126, 127], the result zero or normal. One
//                instruction with AVX-512, three elsewhere
//   ldexp(x, n)  x * 2^n with one rounding, subnormals and overflow included: n integral in
//                [-226, 128], and 2^-26 <= |x| < 2^99 where n < -100, |x| >= 1 where n = 128
//   pow2_addend(n)  2^n for integral n in [-100, 127]; for n in [-226, -100) any value in
//                [0, 2^-100]: for adding to something far larger, which it then leaves alone
//   In the last three a NaN in x comes out as NaN; a NaN in n alone is not defined.
//   load, store  bf16 and fp16 widen exactly and narrow with one RNE (math/dtypes.h)
//   load_n(p, n), store_n(p, n)   touch the first n lanes only, 0 <= n <= lanes; the other lanes read 0
//   store_int8   RNE, for lanes in [-127, 127] (anything else is the caller's error)
// The sign and payload of a NaN that an operation returns are not part of the contract.
#pragma once

#include "dtypes.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace trimtab {
namespace {

struct Mask1 {
  bool m;
  friend TT_INLINE Mask1 operator&(Mask1 a, Mask1 b) { return {a.m && b.m}; }
  friend TT_INLINE Mask1 operator|(Mask1 a, Mask1 b) { return {a.m || b.m}; }
  friend TT_INLINE Mask1 operator!(Mask1 a) { return {!a.m}; }
};

TT_INLINE bool any(Mask1 a) { return a.m; }
TT_INLINE bool all(Mask1 a) { return a.m; }

struct F32x1 {
  static constexpr int lanes = 1;
  using Mask = Mask1;
  using Int = int32_t;

  float v;

  F32x1() = default;
  TT_INLINE F32x1(float x) : v(x) {}  // implicit: V + 1.0f reads like the formula

  static TT_INLINE F32x1 load(const float* p) { return *p; }
  static TT_INLINE F32x1 load(const bf16* p) { return to_float(*p); }
  static TT_INLINE F32x1 load(const fp16* p) { return to_float(*p); }
  static TT_INLINE F32x1 load(const int32_t* p) { return from_int32(*p); }
  static TT_INLINE F32x1 load(const int8_t* p) { return from_int32(*p); }
  template <class T>
  static TT_INLINE F32x1 load_n(const T* p, int n) {
    return n > 0 ? load(p) : F32x1(0.0f);
  }
  static TT_INLINE F32x1 from_int32(Int i) {
#if defined(__CUDA_ARCH__)
    return __int2float_rn(i);
#else
    return static_cast<float>(i);
#endif
  }

  TT_INLINE void store(float* p) const { *p = v; }
  TT_INLINE void store(bf16* p) const { *p = to_bf16(v); }
  TT_INLINE void store(fp16* p) const { *p = to_fp16(v); }
  template <class T>
  TT_INLINE void store_n(T* p, int n) const {
    if (n > 0) store(p);
  }

#if defined(__CUDA_ARCH__)
  friend TT_INLINE F32x1 operator+(F32x1 a, F32x1 b) { return __fadd_rn(a.v, b.v); }
  friend TT_INLINE F32x1 operator-(F32x1 a, F32x1 b) { return __fsub_rn(a.v, b.v); }
  friend TT_INLINE F32x1 operator*(F32x1 a, F32x1 b) { return __fmul_rn(a.v, b.v); }
  friend TT_INLINE F32x1 operator/(F32x1 a, F32x1 b) { return __fdiv_rn(a.v, b.v); }
#else
  friend TT_INLINE F32x1 operator+(F32x1 a, F32x1 b) { return a.v + b.v; }
  friend TT_INLINE F32x1 operator-(F32x1 a, F32x1 b) { return a.v - b.v; }
  friend TT_INLINE F32x1 operator*(F32x1 a, F32x1 b) { return a.v * b.v; }
  friend TT_INLINE F32x1 operator/(F32x1 a, F32x1 b) { return a.v / b.v; }
#endif
  friend TT_INLINE F32x1 operator-(F32x1 a) {
    return float_from_bits(float_bits(a.v) ^ 0x80000000u);
  }
  friend TT_INLINE Mask1 operator<(F32x1 a, F32x1 b) { return {a.v < b.v}; }
  friend TT_INLINE Mask1 operator<=(F32x1 a, F32x1 b) { return {a.v <= b.v}; }
  friend TT_INLINE Mask1 operator>(F32x1 a, F32x1 b) { return {a.v > b.v}; }
  friend TT_INLINE Mask1 operator>=(F32x1 a, F32x1 b) { return {a.v >= b.v}; }
  friend TT_INLINE Mask1 operator==(F32x1 a, F32x1 b) { return {a.v == b.v}; }
};

#if defined(__CUDA_ARCH__)
TT_INLINE F32x1 mul_add_exact(F32x1 a, F32x1 b, F32x1 c) { return __fmaf_rn(a.v, b.v, c.v); }
TT_INLINE F32x1 mul_sub_exact(F32x1 a, F32x1 b, F32x1 c) { return __fmaf_rn(a.v, b.v, -c.v); }
#else
TT_INLINE F32x1 mul_add_exact(F32x1 a, F32x1 b, F32x1 c) { return a * b + c; }
TT_INLINE F32x1 mul_sub_exact(F32x1 a, F32x1 b, F32x1 c) { return a * b - c; }
#endif
TT_INLINE F32x1 fma(F32x1 a, F32x1 b, F32x1 c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a.v, b.v, c.v);
#else
  return __builtin_fmaf(a.v, b.v, c.v);
#endif
}
TT_INLINE F32x1 select(Mask1 m, F32x1 a, F32x1 b) { return m.m ? a.v : b.v; }
TT_INLINE F32x1 min(F32x1 a, F32x1 b) { return a.v < b.v ? a.v : b.v; }
TT_INLINE F32x1 max(F32x1 a, F32x1 b) { return a.v > b.v ? a.v : b.v; }

TT_INLINE F32x1 sqrt(F32x1 a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a.v);
#else
  return __builtin_sqrtf(a.v);
#endif
}

TT_INLINE F32x1 rint(F32x1 a) {
#if defined(__CUDACC__)
  return ::rintf(a.v);
#else
  return __builtin_rintf(a.v);
#endif
}

TT_INLINE F32x1 floor(F32x1 a) {
#if defined(__CUDACC__)
  return ::floorf(a.v);
#else
  return __builtin_floorf(a.v);
#endif
}

TT_INLINE F32x1 ceil(F32x1 a) {
#if defined(__CUDACC__)
  return ::ceilf(a.v);
#else
  return __builtin_ceilf(a.v);
#endif
}

TT_INLINE F32x1 bit_and(F32x1 a, uint32_t c) { return float_from_bits(float_bits(a.v) & c); }
TT_INLINE F32x1 bit_or(F32x1 a, uint32_t c) { return float_from_bits(float_bits(a.v) | c); }
TT_INLINE F32x1 bit_xor(F32x1 a, uint32_t c) { return float_from_bits(float_bits(a.v) ^ c); }
TT_INLINE F32x1 abs(F32x1 a) { return bit_and(a, 0x7fffffffu); }

// |mag| with the sign of sgn.
TT_INLINE F32x1 copysign(F32x1 mag, F32x1 sgn) {
  return float_from_bits((float_bits(mag.v) & 0x7fffffffu) | (float_bits(sgn.v) & 0x80000000u));
}

TT_INLINE Mask1 is_nan(F32x1 a) { return {(float_bits(a.v) & 0x7fffffffu) > 0x7f800000u}; }
TT_INLINE Mask1 is_finite(F32x1 a) { return {(float_bits(a.v) & 0x7fffffffu) < 0x7f800000u}; }

// 2^n for integral n in [-126, 127], Inf for 128: 2^23 + 127 + n has n + 127 in its low mantissa
// bits, and the shift moves it into the exponent field.
TT_INLINE F32x1 pow2_bits(F32x1 n) { return float_from_bits(float_bits((n + 8388735.0f).v) << 23); }
TT_INLINE F32x1 pow2_addend(F32x1 n) { return pow2_bits(max(F32x1(-100.0f), n)); }
TT_INLINE F32x1 scale2n(F32x1 x, F32x1 n) { return x * pow2_bits(n); }
// The first product is exact, so only the second rounds.
TT_INLINE F32x1 ldexp(F32x1 x, F32x1 n) {
  const F32x1 n1 = max(F32x1(-100.0f), n);
  return x * pow2_bits(n1) * pow2_bits(n - n1);
}

TT_INLINE float max_across(F32x1 a) { return a.v; }

TT_INLINE int32_t to_int32_rne(F32x1 a) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(a.v);
#else
  return static_cast<int32_t>(rint(a).v);
#endif
}

TT_INLINE void store_int8(int8_t* p, F32x1 a) { *p = static_cast<int8_t>(to_int32_rne(a)); }
TT_INLINE void store_int8_n(int8_t* p, F32x1 a, int n) {
  if (n > 0) store_int8(p, a);
}

}  // namespace
}  // namespace trimtab
