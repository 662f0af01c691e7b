// quantize_int8: rows over threads, a row by the instruction set's kernel.
#include <trimtab/quantize_int8.h>

#include "cpu/int8_kernels.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace trimtab {

QuantizeRowFn quantize_row(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return quantize_row_avx512;
  return isa == TT_ISA_SCALAR ? quantize_row_scalar : quantize_row_avx2;
}

}  // namespace trimtab

using namespace trimtab;

tt_status tt_quantize_int8(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M, int64_t K,
                           int8_t* q, int64_t q_stride, float* scale, const tt_parallel* parallel) {
  const int size = dtype_size(x_dtype);
  if (size == 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "quantize_int8: expected x of float32, bfloat16 or float16, got dtype %d",
                     x_dtype);
  }
  if (M < 0 || K < 0) {
    return set_error(TT_INVALID_ARGUMENT, "quantize_int8: expected sizes >= 0, got M=%lld K=%lld",
                     (long long)M, (long long)K);
  }
  if (M > 0 && (scale == nullptr || (K > 0 && (x == nullptr || q == nullptr)))) {
    return set_error(TT_INVALID_ARGUMENT, "quantize_int8: x, q or scale is NULL");
  }
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK) return status;
  const QuantizeRowFn row = quantize_row(isa);
  const char* from = static_cast<const char*>(x);
  // A task is about 64 K elements: 10 us, several times what waking a thread costs.
  const int64_t rows_a_task = K > 0 ? (65536 + K - 1) / K : M;
  const int64_t tasks = M > 0 ? (M + rows_a_task - 1) / rows_a_task : 0;
  const tt_parallel pool = pool_or_serial(parallel);
  parallel_run(pool, tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * rows_a_task < M ? (task + 1) * rows_a_task : M;
    for (int64_t m = task * rows_a_task; m < end; ++m)
      row(from + m * x_stride * size, x_dtype, K, q + m * q_stride, scale + m);
  });
  return TT_OK;
}
