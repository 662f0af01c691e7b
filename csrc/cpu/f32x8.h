// F32x8: eight floats on AVX2 + F16C. The interface and its contract stand in math/f32x1.h.
// Compile with -mavx2 -mf16c -ffp-contract=off. With -mfma too, mul_add_exact becomes one
// instruction; nothing else is ever fused.
#pragma once

#include <immintrin.h>

#include "../math/dtypes.h"

namespace trimtab {
namespace {

struct Mask8 {
  __m256 m;  // all ones or all zeros a lane
  friend TT_INLINE Mask8 operator&(Mask8 a, Mask8 b) { return {_mm256_and_ps(a.m, b.m)}; }
  friend TT_INLINE Mask8 operator|(Mask8 a, Mask8 b) { return {_mm256_or_ps(a.m, b.m)}; }
  friend TT_INLINE Mask8 operator!(Mask8 a) {
    return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
  }
};

TT_INLINE bool any(Mask8 a) { return _mm256_movemask_ps(a.m) != 0; }
TT_INLINE bool all(Mask8 a) { return _mm256_movemask_ps(a.m) == 0xff; }

struct F32x8 {
  static constexpr int lanes = 8;
  using Mask = Mask8;
  using Int = __m256i;

  __m256 v;

  F32x8() = default;
  TT_INLINE F32x8(float x) : v(_mm256_set1_ps(x)) {}
  TT_INLINE F32x8(__m256 x) : v(x) {}

  static TT_INLINE F32x8 load(const float* p) { return _mm256_loadu_ps(p); }
  static TT_INLINE F32x8 load(const bf16* p) { return widen_bf16(load16(p)); }
  static TT_INLINE F32x8 load(const fp16* p) { return _mm256_cvtph_ps(load16(p)); }
  static TT_INLINE F32x8 load(const int32_t* p) {
    return from_int32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static TT_INLINE F32x8 load(const int8_t* p) {
    return from_int32(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static TT_INLINE F32x8 load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static TT_INLINE F32x8 load_n(const bf16* p, int n) { return widen_bf16(load16_n(p, n)); }
  static TT_INLINE F32x8 load_n(const fp16* p, int n) { return _mm256_cvtph_ps(load16_n(p, n)); }
  static TT_INLINE F32x8 load_n(const int32_t* p, int n) {
    return from_int32(_mm256_maskload_epi32(p, first(n)));
  }
  static TT_INLINE F32x8 from_int32(Int i) { return _mm256_cvtepi32_ps(i); }

  TT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  TT_INLINE void store(bf16* p) const { store16(p, narrow_bf16()); }
  TT_INLINE void store(fp16* p) const { store16(p, narrow_fp16()); }
  TT_INLINE void store_n(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  TT_INLINE void store_n(bf16* p, int n) const { store16_n(p, narrow_bf16(), n); }
  TT_INLINE void store_n(fp16* p, int n) const { store16_n(p, narrow_fp16(), n); }

  friend TT_INLINE F32x8 operator+(F32x8 a, F32x8 b) { return _mm256_add_ps(a.v, b.v); }
  friend TT_INLINE F32x8 operator-(F32x8 a, F32x8 b) { return _mm256_sub_ps(a.v, b.v); }
  friend TT_INLINE F32x8 operator*(F32x8 a, F32x8 b) { return _mm256_mul_ps(a.v, b.v); }
  friend TT_INLINE F32x8 operator/(F32x8 a, F32x8 b) { return _mm256_div_ps(a.v, b.v); }
  friend TT_INLINE F32x8 operator-(F32x8 a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
  friend TT_INLINE Mask8 operator<(F32x8 a, F32x8 b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
  }
  friend TT_INLINE Mask8 operator<=(F32x8 a, F32x8 b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)};
  }
  friend TT_INLINE Mask8 operator>(F32x8 a, F32x8 b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)};
  }
  friend TT_INLINE Mask8 operator>=(F32x8 a, F32x8 b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)};
  }
  friend TT_INLINE Mask8 operator==(F32x8 a, F32x8 b) {
    return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
  }

 private:
  // -1 in the first n 32-bit lanes.
  static TT_INLINE __m256i first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  }
  static TT_INLINE __m128i load16(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static TT_INLINE void store16(void* p, __m128i h) {
    _mm_storeu_si128(static_cast<__m128i*>(p), h);
  }
  // AVX2 has no masked 16-bit moves: a tail goes through the stack.
  static TT_INLINE __m128i load16_n(const void* p, int n) {
    alignas(16) uint16_t buffer[8] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n) * 2);
    return load16(buffer);
  }
  static TT_INLINE void store16_n(void* p, __m128i h, int n) {
    alignas(16) uint16_t buffer[8];
    store16(buffer, h);
    std::memcpy(p, buffer, static_cast<size_t>(n) * 2);
  }
  static TT_INLINE F32x8 widen_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  // Eight 32-bit lanes below 2^16 to eight 16-bit lanes.
  static TT_INLINE __m128i narrow16(__m256i w) {
    return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  }
  // to_bf16 of dtypes.h, lane by lane.
  TT_INLINE __m128i narrow_bf16() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i top = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i rounded = _mm256_srli_epi32(up, 16);
    return narrow16(
        _mm256_blendv_epi8(rounded, _mm256_set1_epi32(kBf16Nan), _mm256_castps_si256(nan)));
  }
  // vcvtps2ph keeps a NaN's sign and payload: first replace it by the fp32 NaN that narrows to 0x7e00.
  TT_INLINE __m128i narrow_fp16() const {
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_cvtps_ph(_mm256_blendv_ps(v, quiet, nan),
                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#if defined(__FMA__)
TT_INLINE F32x8 mul_add_exact(F32x8 a, F32x8 b, F32x8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
TT_INLINE F32x8 mul_sub_exact(F32x8 a, F32x8 b, F32x8 c) { return _mm256_fmsub_ps(a.v, b.v, c.v); }
TT_INLINE F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
#else
TT_INLINE F32x8 mul_add_exact(F32x8 a, F32x8 b, F32x8 c) { return a * b + c; }
TT_INLINE F32x8 mul_sub_exact(F32x8 a, F32x8 b, F32x8 c) { return a * b - c; }
#endif
TT_INLINE F32x8 select(Mask8 m, F32x8 a, F32x8 b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
TT_INLINE F32x8 min(F32x8 a, F32x8 b) { return _mm256_min_ps(a.v, b.v); }
TT_INLINE F32x8 max(F32x8 a, F32x8 b) { return _mm256_max_ps(a.v, b.v); }
TT_INLINE F32x8 sqrt(F32x8 a) { return _mm256_sqrt_ps(a.v); }
TT_INLINE F32x8 rint(F32x8 a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TT_INLINE F32x8 floor(F32x8 a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
TT_INLINE F32x8 ceil(F32x8 a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}

TT_INLINE __m256 constant_bits8(uint32_t c) {
  return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(c)));
}
TT_INLINE F32x8 bit_and(F32x8 a, uint32_t c) { return _mm256_and_ps(a.v, constant_bits8(c)); }
TT_INLINE F32x8 bit_or(F32x8 a, uint32_t c) { return _mm256_or_ps(a.v, constant_bits8(c)); }
TT_INLINE F32x8 bit_xor(F32x8 a, uint32_t c) { return _mm256_xor_ps(a.v, constant_bits8(c)); }
TT_INLINE F32x8 abs(F32x8 a) { return bit_and(a, 0x7fffffffu); }
TT_INLINE F32x8 copysign(F32x8 mag, F32x8 sgn) {
  return _mm256_or_ps(abs(mag).v, bit_and(sgn, 0x80000000u).v);
}

TT_INLINE Mask8 is_nan(F32x8 a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
TT_INLINE Mask8 is_finite(F32x8 a) {
  return {_mm256_cmp_ps(abs(a).v, constant_bits8(0x7f800000u), _CMP_LT_OQ)};
}

// The bit tricks are explained at their scalar forms in math/f32x1.h.
TT_INLINE F32x8 pow2_bits(F32x8 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256((n + 8388735.0f).v), 23));
}
TT_INLINE F32x8 pow2_addend(F32x8 n) { return pow2_bits(max(F32x8(-100.0f), n)); }
TT_INLINE F32x8 scale2n(F32x8 x, F32x8 n) { return x * pow2_bits(n); }
TT_INLINE F32x8 ldexp(F32x8 x, F32x8 n) {
  const F32x8 n1 = max(F32x8(-100.0f), n);
  return x * pow2_bits(n1) * pow2_bits(n - n1);
}

TT_INLINE float max_across(F32x8 a) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

TT_INLINE __m256i to_int32_rne(F32x8 a) { return _mm256_cvtps_epi32(a.v); }

// The saturating packs are exact for lanes in [-127, 127].
TT_INLINE __m128i narrow_int8(F32x8 a) {
  const __m256i w = to_int32_rne(a);
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  return _mm_packs_epi16(h, h);
}
TT_INLINE void store_int8(int8_t* p, F32x8 a) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_int8(a));
}
TT_INLINE void store_int8_n(int8_t* p, F32x8 a, int n) {
  alignas(16) int8_t buffer[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow_int8(a));
  std::memcpy(p, buffer, static_cast<size_t>(n));
}

}  // namespace
}  // namespace trimtab
