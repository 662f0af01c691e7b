// rms_norm_quantize_int8: rows over threads, a row by the instruction set's kernel.
#include "cpu/rms_norm_quantize_int8.h"

#include <trimtab/rms_norm_quantize_int8.h>

#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/quantize_rows.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "rms_norm_quantize_int8";

RmsNormRowFn rms_norm_row(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return rms_norm_row_avx512;
  return isa == TT_ISA_SCALAR ? rms_norm_row_scalar : rms_norm_row_avx2;
}

// The weight as fp32: itself, or widened once a call.
const float* widen(const void* weight, tt_dtype dtype, int64_t K) {
  if (dtype == TT_F32) return static_cast<const float*>(weight);
  float* wide = static_cast<float*>(thread_scratch(K * 4 + 64));
  if (wide == nullptr) return nullptr;
  for (int64_t k = 0; k < K; ++k)
    wide[k] = dtype == TT_BF16 ? to_float(static_cast<const bf16*>(weight)[k])
                               : to_float(static_cast<const fp16*>(weight)[k]);
  return wide;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_rms_norm_quantize_int8(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                    const void* weight, tt_dtype weight_dtype, float eps, int64_t M,
                                    int64_t K, int8_t* q, int64_t q_stride, float* scale,
                                    const tt_parallel* parallel) {
  const int size = dtype_size(x_dtype);
  if (size == 0)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, got dtype %d", kOp, x_dtype);
  if (weight_dtype != TT_F32 && weight_dtype != x_dtype)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected weight of float32 or x's dtype %d, got dtype %d", kOp, x_dtype,
                     weight_dtype);
  if (M < 0 || K < 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld K=%lld", kOp,
                     (long long)M, (long long)K);
  if (M > 0 && (scale == nullptr || (K > 0 && (x == nullptr || weight == nullptr || q == nullptr))))
    return set_error(TT_INVALID_ARGUMENT, "%s: x, weight, q or scale is NULL", kOp);
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK || M == 0) return status;
  const float* factors = K > 0 ? widen(weight, weight_dtype, K) : nullptr;
  if (K > 0 && factors == nullptr)
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", kOp,
                     (long long)(K * 4));
  const RmsNormRowFn row = rms_norm_row(isa);
  return run_quantize_rows(kOp, M, K, parallel, [&](int64_t m, float* y) {
    row(static_cast<const char*>(x) + m * x_stride * size, x_dtype, factors, eps, K, y,
        q + m * q_stride, scale + m);
  });
}
