// F32x16: sixteen floats on AVX-512. The interface and its contract stand in math/f32x1.h.
// Compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -ffp-contract=off. The only
// fused instructions are those of mul_add_exact, where fusing changes no bit.
#pragma once

// GCC 12 initialises its undefined vectors with themselves and then warns about it (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "../math/dtypes.h"

namespace trimtab {
namespace {

struct Mask16 {
  __mmask16 m;
  friend TT_INLINE Mask16 operator&(Mask16 a, Mask16 b) { return {_kand_mask16(a.m, b.m)}; }
  friend TT_INLINE Mask16 operator|(Mask16 a, Mask16 b) { return {_kor_mask16(a.m, b.m)}; }
  friend TT_INLINE Mask16 operator!(Mask16 a) { return {_knot_mask16(a.m)}; }
};

TT_INLINE bool any(Mask16 a) { return a.m != 0; }
TT_INLINE bool all(Mask16 a) { return a.m == 0xffff; }

struct F32x16 {
  static constexpr int lanes = 16;
  using Mask = Mask16;
  using Int = __m512i;

  __m512 v;

  F32x16() = default;
  TT_INLINE F32x16(float x) : v(_mm512_set1_ps(x)) {}
  TT_INLINE F32x16(__m512 x) : v(x) {}

  static TT_INLINE F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
  static TT_INLINE F32x16 load(const bf16* p) { return widen_bf16(_mm256_loadu_epi16(p)); }
  static TT_INLINE F32x16 load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_epi16(p)); }
  static TT_INLINE F32x16 load(const int32_t* p) { return from_int32(_mm512_loadu_si512(p)); }
  static TT_INLINE F32x16 load(const int8_t* p) {
    return from_int32(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static TT_INLINE F32x16 load_n(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static TT_INLINE F32x16 load_n(const bf16* p, int n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static TT_INLINE F32x16 load_n(const fp16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static TT_INLINE F32x16 load_n(const int32_t* p, int n) {
    return from_int32(_mm512_maskz_loadu_epi32(first(n), p));
  }
  static TT_INLINE F32x16 from_int32(Int i) { return _mm512_cvtepi32_ps(i); }

  TT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  TT_INLINE void store(bf16* p) const { _mm256_storeu_epi16(p, narrow_bf16()); }
  TT_INLINE void store(fp16* p) const { _mm256_storeu_epi16(p, narrow_fp16()); }
  TT_INLINE void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  TT_INLINE void store_n(bf16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow_bf16());
  }
  TT_INLINE void store_n(fp16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow_fp16());
  }

  // Both halves of a cache line in one store: a line that is written whole need not be read first.
  static TT_INLINE void store_pair(bf16* p, F32x16 a, F32x16 b) {
    store_halves(p, a.narrow_bf16(), b.narrow_bf16());
  }
  static TT_INLINE void store_pair(fp16* p, F32x16 a, F32x16 b) {
    store_halves(p, a.narrow_fp16(), b.narrow_fp16());
  }

  friend TT_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return _mm512_add_ps(a.v, b.v); }
  friend TT_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return _mm512_sub_ps(a.v, b.v); }
  friend TT_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return _mm512_mul_ps(a.v, b.v); }
  friend TT_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return _mm512_div_ps(a.v, b.v); }
  friend TT_INLINE F32x16 operator-(F32x16 a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
  friend TT_INLINE Mask16 operator<(F32x16 a, F32x16 b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
  }
  friend TT_INLINE Mask16 operator<=(F32x16 a, F32x16 b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
  }
  friend TT_INLINE Mask16 operator>(F32x16 a, F32x16 b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)};
  }
  friend TT_INLINE Mask16 operator>=(F32x16 a, F32x16 b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)};
  }
  friend TT_INLINE Mask16 operator==(F32x16 a, F32x16 b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
  }

 private:
  static TT_INLINE void store_halves(void* p, __m256i a, __m256i b) {
    _mm512_storeu_si512(p, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
  }
  // One bit for each of the first n lanes, n in 0..16.
  static TT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static TT_INLINE F32x16 widen_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  // to_bf16 of dtypes.h, lane by lane. (vcvtneps2bf16 would flush subnormals.) One vpermw gathers
  // the sixteen upper halves, which are the words 1, 3, 5, ..., 31; its merge mask puts in the NaN.
  TT_INLINE __m256i narrow_bf16() const {
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __m512i down = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
    const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29,
                                           27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(
        _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(kBf16Nan), number, upper, rounded));
  }
  TT_INLINE __m256i narrow_fp16() const {
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_mask_mov_epi16(_mm256_set1_epi16(kFp16Nan), number, h);
  }
};

TT_INLINE F32x16 mul_add_exact(F32x16 a, F32x16 b, F32x16 c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
TT_INLINE F32x16 mul_sub_exact(F32x16 a, F32x16 b, F32x16 c) {
  return _mm512_fmsub_ps(a.v, b.v, c.v);
}
TT_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
TT_INLINE F32x16 select(Mask16 m, F32x16 a, F32x16 b) { return _mm512_mask_mov_ps(b.v, m.m, a.v); }
TT_INLINE F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a.v, b.v); }
TT_INLINE F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a.v, b.v); }
TT_INLINE F32x16 sqrt(F32x16 a) { return _mm512_sqrt_ps(a.v); }
TT_INLINE F32x16 rint(F32x16 a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TT_INLINE F32x16 floor(F32x16 a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
TT_INLINE F32x16 ceil(F32x16 a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}

TT_INLINE __m512 constant_bits16(uint32_t c) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(c)));
}
TT_INLINE F32x16 bit_and(F32x16 a, uint32_t c) { return _mm512_and_ps(a.v, constant_bits16(c)); }
TT_INLINE F32x16 bit_or(F32x16 a, uint32_t c) { return _mm512_or_ps(a.v, constant_bits16(c)); }
TT_INLINE F32x16 bit_xor(F32x16 a, uint32_t c) { return _mm512_xor_ps(a.v, constant_bits16(c)); }
TT_INLINE F32x16 abs(F32x16 a) { return bit_and(a, 0x7fffffffu); }

// The truth table 0xd8 picks bit by bit: where the third operand is 1 the second, else the first.
TT_INLINE F32x16 copysign(F32x16 mag, F32x16 sgn) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(mag.v), _mm512_castps_si512(sgn.v), _mm512_set1_epi32(INT32_MIN), 0xd8));
}

TT_INLINE Mask16 is_nan(F32x16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
TT_INLINE Mask16 is_finite(F32x16 a) {
  return {_mm512_cmp_ps_mask(abs(a).v, constant_bits16(0x7f800000u), _CMP_LT_OQ)};
}

// vscalefps is x * 2^floor(n), rounded once: what the other types do in several steps.
TT_INLINE F32x16 pow2_addend(F32x16 n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v); }
TT_INLINE F32x16 scale2n(F32x16 x, F32x16 n) { return _mm512_scalef_ps(x.v, n.v); }
TT_INLINE F32x16 ldexp(F32x16 x, F32x16 n) { return _mm512_scalef_ps(x.v, n.v); }

TT_INLINE float max_across(F32x16 a) { return _mm512_reduce_max_ps(a.v); }

TT_INLINE __m512i to_int32_rne(F32x16 a) { return _mm512_cvtps_epi32(a.v); }

TT_INLINE void store_int8(int8_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(to_int32_rne(a)));
}
TT_INLINE void store_int8_n(int8_t* p, F32x16 a, int n) {
  const __mmask16 first = static_cast<__mmask16>((1u << n) - 1u);
  _mm512_mask_cvtepi32_storeu_epi8(p, first, to_int32_rne(a));
}

}  // namespace
}  // namespace trimtab
