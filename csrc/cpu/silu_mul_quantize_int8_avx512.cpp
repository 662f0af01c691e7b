#include "cpu/f32x16.h"

#include "cpu/silu_mul_quantize_int8.h"

namespace trimtab {

void silu_mul_row_avx512(const void* gate, const void* up, tt_dtype dtype, int64_t K, float* y,
                         int8_t* q, float* scale) {
  silu_mul_row<F32x16>(gate, up, dtype, K, y, q, scale);
}

}  // namespace trimtab
