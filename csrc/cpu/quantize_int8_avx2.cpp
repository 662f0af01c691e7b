#include "cpu/f32x8.h"
#include "cpu/quantize_int8.h"

namespace trimtab {

void quantize_row_avx2(const void* x, tt_dtype dtype, int64_t K, int8_t* q, float* scale) {
  quantize_row<F32x8>(x, dtype, K, q, scale);
}

}  // namespace trimtab
