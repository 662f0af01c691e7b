// silu_mul_quantize_int8: rows over threads, a row by the instruction set's kernel.
#include "cpu/silu_mul_quantize_int8.h"

#include <trimtab/silu_mul_quantize_int8.h>

#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/quantize_rows.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "silu_mul_quantize_int8";

SiluMulRowFn silu_mul_row(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return silu_mul_row_avx512;
  return isa == TT_ISA_SCALAR ? silu_mul_row_scalar : silu_mul_row_avx2;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_silu_mul_quantize_int8(const void* gate, int64_t gate_stride, const void* up,
                                    int64_t up_stride, tt_dtype dtype, int64_t M, int64_t K,
                                    int8_t* q, int64_t q_stride, float* scale,
                                    const tt_parallel* parallel) {
  const int size = dtype_size(dtype);
  if (size == 0)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected gate and up of float32, bfloat16 or float16, got dtype %d", kOp,
                     dtype);
  if (M < 0 || K < 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld K=%lld", kOp,
                     (long long)M, (long long)K);
  if (M > 0 && (scale == nullptr || (K > 0 && (gate == nullptr || up == nullptr || q == nullptr))))
    return set_error(TT_INVALID_ARGUMENT, "%s: gate, up, q or scale is NULL", kOp);
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK) return status;
  const SiluMulRowFn row = silu_mul_row(isa);
  return run_quantize_rows(kOp, M, K, parallel, [&](int64_t m, float* y) {
    row(static_cast<const char*>(gate) + m * gate_stride * size,
        static_cast<const char*>(up) + m * up_stride * size, dtype, K, y, q + m * q_stride,
        scale + m);
  });
}
