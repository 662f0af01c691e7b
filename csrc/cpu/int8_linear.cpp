// int8_linear: rows come as floats and are quantized on their way into the panels.
#include <trimtab/int8_linear.h>

#include "cpu/int8_product.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

struct FloatRows {
  const char* x;
  int64_t row_bytes, x_stride, K;
  tt_dtype dtype;
};

void fill(const void* self, const Int8Kernel& kernel, int64_t m, int rows, void* panel,
          float* scale) {
  const FloatRows& from = *static_cast<const FloatRows*>(self);
  kernel.quantize_a(from.x + m * from.row_bytes, from.dtype, from.x_stride, rows, from.K, panel,
                    scale);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_linear(const void* x, tt_dtype x_dtype, int64_t x_stride, const int8_t* b_packed,
                         int64_t M, int64_t N, int64_t K, const tt_epilogue* epilogue,
                         const tt_parallel* parallel) {
  const tt_status status = check_product("int8_linear", M, N, K, b_packed, epilogue, true);
  if (status != TT_OK) return status;
  const int size = dtype_size(x_dtype);
  if (size == 0 || (x == nullptr && M > 0 && K > 0)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "int8_linear: expected x of float32, bfloat16 or float16, not NULL");
  }
  const FloatRows rows{static_cast<const char*>(x), x_stride * size, x_stride, K, x_dtype};
  return run_product("int8_linear", {fill, &rows}, b_packed, M, N, K, *epilogue, parallel);
}
