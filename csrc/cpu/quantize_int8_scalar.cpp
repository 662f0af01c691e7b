#include "cpu/quantize_int8.h"
#include "math/f32x1.h"

namespace trimtab {

void quantize_row_scalar(const void* x, tt_dtype dtype, int64_t K, int8_t* q, float* scale) {
  quantize_row<F32x1>(x, dtype, K, q, scale);
}

}  // namespace trimtab
