// bits_max(a, b): lane by lane the larger bit pattern as a signed integer; bits_max_across(a): of all lanes. For a, b >= 0 that is the
// larger float, with Inf and then NaN on top, so that a reduction keeps a NaN where max() loses it.
// unsigned_max(a, b): as unsigned integers, for b whose sign is set in a NaN only.
#pragma once
#include "math/f32x1.h"
#if defined(__AVX512F__)
#include "cpu/f32x16.h"
#elif defined(__AVX2__)
#include "cpu/f32x8.h"
#endif

namespace trimtab {
namespace {

TT_INLINE F32x1 bits_max(F32x1 a, F32x1 b) {
  return int32_t(float_bits(a.v)) > int32_t(float_bits(b.v)) ? a : b;
}
TT_INLINE F32x1 unsigned_max(F32x1 a, F32x1 b) { return float_bits(a.v) > float_bits(b.v) ? a : b; }
TT_INLINE float bits_max_across(F32x1 a) { return a.v; }
#if defined(__AVX512F__)
TT_INLINE F32x16 bits_max(F32x16 a, F32x16 b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
}
TT_INLINE F32x16 unsigned_max(F32x16 a, F32x16 b) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
}
TT_INLINE float bits_max_across(F32x16 a) {
  return float_from_bits(uint32_t(_mm512_reduce_max_epi32(_mm512_castps_si512(a.v))));
}
#elif defined(__AVX2__)
TT_INLINE F32x8 bits_max(F32x8 a, F32x8 b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
}
TT_INLINE F32x8 unsigned_max(F32x8 a, F32x8 b) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
}
TT_INLINE float bits_max_across(F32x8 a) {
  const __m256i w = _mm256_castps_si256(a.v);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return float_from_bits(
      uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)))));
}
#endif

}  // namespace
}  // namespace trimtab
