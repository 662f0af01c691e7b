// U32x16: sixteen 32-bit words on AVX-512. The interface stands in math/u32x1.h.
#pragma once
#include "../math/u32x1.h"
#include "f32x16.h"

namespace trimtab {
namespace {

struct U32x16 {
  static constexpr int lanes = 16;
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
  TT_INLINE F32x16 lookup32(const float* table) const {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), v, _mm512_loadu_ps(table + 16));
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

}  // namespace
}  // namespace trimtab
