#include "cpu/f32x16.h"
#include "cpu/quantize_int8.h"

namespace trimtab {

void quantize_row_avx512(const void* x, tt_dtype dtype, int64_t K, int8_t* q, float* scale) {
  quantize_row<F32x16>(x, dtype, K, q, scale);
}

}  // namespace trimtab
