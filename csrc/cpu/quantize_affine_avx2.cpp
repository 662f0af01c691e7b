#include "cpu/f32x8.h"
#include "cpu/quantize_affine.h"

namespace trimtab {
namespace {

// Eight integral lanes in 0..255 to bytes; the saturating packs are exact for them.
TT_INLINE __m128i narrow_codes(F32x8 code) {
  const __m256i w = to_int32_rne(code);
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  return _mm_packus_epi16(h, h);
}
TT_INLINE void store_codes(uint8_t* q, F32x8 code) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(q), narrow_codes(code));
}
TT_INLINE void store_codes_n(uint8_t* q, F32x8 code, int n) {
  alignas(16) uint8_t buffer[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow_codes(code));
  std::memcpy(q, buffer, size_t(n));
}
TT_INLINE void load_codes(const uint8_t* q, F32x8* code) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
  *code = F32x8::from_int32(_mm256_cvtepu8_epi32(bytes));
}
TT_INLINE void load_codes_n(const uint8_t* q, int n, F32x8* code) {
  alignas(16) uint8_t buffer[8] = {};
  std::memcpy(buffer, q, size_t(n));
  load_codes(buffer, code);
}

}  // namespace

const AffineKernel kAffineAvx2 = {quantize_affine<F32x8>, dequantize_affine<F32x8>};

}  // namespace trimtab
