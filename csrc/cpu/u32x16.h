// U32x16: sixteen 32-bit words on AVX-512. The interface stands in math/u32x1.h.
#pragma once
#include "../math/u32x1.h"
#include "f32x16.h"

namespace trimtab {
namespace {

struct U32x16 {
  static constexpr int lanes = 16;
  static constexpr bool has_lookup32 = true;
  __m512i v;

  U32x16() = default;
  TT_INLINE U32x16(uint32_t x) : v(_mm512_set1_epi32(int(x))) {}
  TT_INLINE U32x16(__m512i x) : v(x) {}
  explicit TT_INLINE U32x16(F32x16 x) : v(_mm512_castps_si512(x.v)) {}
  TT_INLINE F32x16 floats() const { return _mm512_castsi512_ps(v); }
  TT_INLINE F32x16 to_floats() const { return _mm512_cvtepi32_ps(v); }
  static TT_INLINE U32x16 of_integral(F32x16 x) { return to_int32_rne(x); }
  static TT_INLINE U32x16 from(uint32_t start) {
    return _mm512_add_epi32(
        _mm512_set1_epi32(int(start)),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  // The table twice over: the instruction reads four bits of the index.
  TT_INLINE F32x16 lookup8(const float* table) const {
    return _mm512_permutexvar_ps(v, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
  }
  TT_INLINE F32x16 lookup16(const float* table) const {
    return _mm512_permutexvar_ps(v, _mm512_loadu_ps(table));
  }
  TT_INLINE F32x16 lookup32(const float* table) const {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), v, _mm512_loadu_ps(table + 16));
  }
  TT_INLINE U32x16 lookup32(const uint32_t* table) const {
    return _mm512_permutex2var_epi32(_mm512_loadu_si512(table), v, _mm512_loadu_si512(table + 16));
  }
  // One multiplication of 16-bit lanes; the upper ones are 0.
  TT_INLINE U32x16 times_shift16(uint32_t c) const {
    return _mm512_mulhi_epu16(v, _mm512_set1_epi32(int(c)));
  }
  TT_INLINE U32x16 plus_one(Mask16 mask) const {
    return _mm512_mask_sub_epi32(v, mask.m, v, _mm512_set1_epi32(-1));
  }

  static TT_INLINE U32x16 load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static TT_INLINE U32x16 load16(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TT_INLINE void store_bytes(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  TT_INLINE void store16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }

  // The packs take four lanes of each vector in turn, which one permutation of words puts right.
  static TT_INLINE void store_codes(const F32x16 (&from)[4], int32_t bias, uint8_t* p) {
    const __m512i b = _mm512_set1_epi16(short(bias));
    const __m512i low = _mm512_packs_epi32(to_int32_rne(from[0]), to_int32_rne(from[1]));
    const __m512i high = _mm512_packs_epi32(to_int32_rne(from[2]), to_int32_rne(from[3]));
    const __m512i bytes = _mm512_packus_epi16(_mm512_add_epi16(low, b), _mm512_add_epi16(high, b));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
  }

  friend TT_INLINE U32x16 operator+(U32x16 a, U32x16 b) { return _mm512_add_epi32(a.v, b.v); }
  friend TT_INLINE U32x16 operator*(U32x16 a, U32x16 b) { return _mm512_mullo_epi32(a.v, b.v); }
  friend TT_INLINE U32x16 operator^(U32x16 a, U32x16 b) { return _mm512_xor_si512(a.v, b.v); }
  friend TT_INLINE U32x16 operator&(U32x16 a, U32x16 b) { return _mm512_and_si512(a.v, b.v); }
  friend TT_INLINE U32x16 operator>>(U32x16 a, int n) {
    return _mm512_srli_epi32(a.v, unsigned(n));
  }
  friend TT_INLINE U32x16 operator<<(U32x16 a, int n) {
    return _mm512_slli_epi32(a.v, unsigned(n));
  }
};

template <>
struct WordsOf<F32x16> {
  using type = U32x16;
};

// The truth table 0x78: the first operand, flipped where both others are 1.
TT_INLINE F32x16 flip_sign(F32x16 a, F32x16 b) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(a.v), _mm512_castps_si512(b.v), _mm512_set1_epi32(INT32_MIN), 0x78));
}
// One instruction: the larger magnitude, without sign.
TT_INLINE F32x16 max_magnitude(F32x16 a, F32x16 b) { return _mm512_range_ps(a.v, b.v, 0b1011); }

}  // namespace
}  // namespace trimtab
