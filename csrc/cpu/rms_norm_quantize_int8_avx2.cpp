#include "cpu/f32x8.h"

#include "cpu/rms_norm_quantize_int8.h"

namespace trimtab {

void rms_norm_row_avx2(const void* x, tt_dtype dtype, const float* weight, float eps, int64_t K,
                       float* y, int8_t* q, float* scale) {
  rms_norm_row<F32x8>(x, dtype, weight, eps, K, y, q, scale);
}

}  // namespace trimtab
