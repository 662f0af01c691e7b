#include "cpu/quantize_affine.h"

namespace trimtab {
namespace {

TT_INLINE void store_codes(uint8_t* q, F32x1 code) { *q = uint8_t(code.v); }
TT_INLINE void store_codes_n(uint8_t* q, F32x1 code, int) { store_codes(q, code); }
TT_INLINE void load_codes(const uint8_t* q, F32x1* code) { *code = F32x1(float(*q)); }
TT_INLINE void load_codes_n(const uint8_t* q, int, F32x1* code) { load_codes(q, code); }

}  // namespace

const AffineKernel kAffineScalar = {quantize_affine<F32x1>, dequantize_affine<F32x1>};

}  // namespace trimtab
