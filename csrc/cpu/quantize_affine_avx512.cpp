#include "cpu/f32x16.h"
#include "cpu/quantize_affine.h"

namespace trimtab {
namespace {

TT_INLINE __mmask16 first_codes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
TT_INLINE void store_codes(uint8_t* q, F32x16 code) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(to_int32_rne(code)));
}
TT_INLINE void store_codes_n(uint8_t* q, F32x16 code, int n) {
  _mm512_mask_cvtepi32_storeu_epi8(q, first_codes(n), to_int32_rne(code));
}
TT_INLINE void load_codes(const uint8_t* q, F32x16* code) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  *code = F32x16::from_int32(_mm512_cvtepu8_epi32(bytes));
}
TT_INLINE void load_codes_n(const uint8_t* q, int n, F32x16* code) {
  *code = F32x16::from_int32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_codes(n), q)));
}

}  // namespace

const AffineKernel kAffineAvx512 = {quantize_affine<F32x16>, dequantize_affine<F32x16>};

}  // namespace trimtab
