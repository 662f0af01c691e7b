// U32x8: eight 32-bit words on AVX2. The interface stands in math/u32x1.h.
#pragma once
#include "../math/u32x1.h"
#include "f32x8.h"

namespace trimtab {
namespace {

struct U32x8 {
  static constexpr int lanes = 8;
  static constexpr bool has_lookup32 = false;
  __m256i v;

  U32x8() = default;
  TT_INLINE U32x8(uint32_t x) : v(_mm256_set1_epi32(int(x))) {}
  TT_INLINE U32x8(__m256i x) : v(x) {}
  explicit TT_INLINE U32x8(F32x8 x) : v(_mm256_castps_si256(x.v)) {}
  TT_INLINE F32x8 floats() const { return _mm256_castsi256_ps(v); }
  TT_INLINE F32x8 to_floats() const { return _mm256_cvtepi32_ps(v); }
  static TT_INLINE U32x8 of_integral(F32x8 x) { return to_int32_rne(x); }
  static TT_INLINE U32x8 from(uint32_t start) {
    return _mm256_add_epi32(_mm256_set1_epi32(int(start)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  TT_INLINE F32x8 lookup8(const float* table) const {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), v);  // reads the low three bits
  }
  // Bit 3 of the index picks one of two eights; blendv reads the top bit.
  TT_INLINE F32x8 lookup16(const float* table) const {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28));
    return _mm256_blendv_ps(lookup8(table).v, lookup8(table + 8).v, bit3);
  }
  // One multiplication of 16-bit lanes; the upper ones are 0.
  TT_INLINE U32x8 times_shift16(uint32_t c) const {
    return _mm256_mulhi_epu16(v, _mm256_set1_epi32(int(c)));
  }
  TT_INLINE U32x8 plus_one(Mask8 mask) const {
    return _mm256_sub_epi32(v, _mm256_castps_si256(mask.m));
  }

  static TT_INLINE U32x8 load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static TT_INLINE U32x8 load16(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TT_INLINE void store_bytes(uint8_t* p) const {
    const __m128i h = narrow16();
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h, h));
  }
  TT_INLINE void store16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow16());
  }

  // The packs take four lanes of each vector in turn, which one permutation of words puts right.
  static TT_INLINE void store_codes(const F32x8 (&from)[4], int32_t bias, uint8_t* p) {
    const __m256i b = _mm256_set1_epi16(short(bias));
    const __m256i low = _mm256_packs_epi32(to_int32_rne(from[0]), to_int32_rne(from[1]));
    const __m256i high = _mm256_packs_epi32(to_int32_rne(from[2]), to_int32_rne(from[3]));
    const __m256i bytes = _mm256_packus_epi16(_mm256_add_epi16(low, b), _mm256_add_epi16(high, b));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
  }

  friend TT_INLINE U32x8 operator+(U32x8 a, U32x8 b) { return _mm256_add_epi32(a.v, b.v); }
  friend TT_INLINE U32x8 operator*(U32x8 a, U32x8 b) { return _mm256_mullo_epi32(a.v, b.v); }
  friend TT_INLINE U32x8 operator^(U32x8 a, U32x8 b) { return _mm256_xor_si256(a.v, b.v); }
  friend TT_INLINE U32x8 operator&(U32x8 a, U32x8 b) { return _mm256_and_si256(a.v, b.v); }
  friend TT_INLINE U32x8 operator>>(U32x8 a, int n) { return _mm256_srli_epi32(a.v, n); }
  friend TT_INLINE U32x8 operator<<(U32x8 a, int n) { return _mm256_slli_epi32(a.v, n); }

 private:
  TT_INLINE __m128i narrow16() const {
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
};

template <>
struct WordsOf<F32x8> {
  using type = U32x8;
};

TT_INLINE F32x8 flip_sign(F32x8 a, F32x8 b) {
  return _mm256_xor_ps(a.v, bit_and(b, 0x80000000u).v);
}
TT_INLINE F32x8 max_magnitude(F32x8 a, F32x8 b) { return max(abs(a), b); }

}  // namespace
}  // namespace trimtab
