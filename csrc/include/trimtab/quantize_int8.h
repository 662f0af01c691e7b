/* quantize_int8: symmetric int8 with one fp32 scale a row (NUMERICS.md section 2).
 *
 *   scale[m] = max_k |x[m,k]| / 127;   q[m,k] = clamp(rne(x[m,k] * (127 / absmax)), -127, 127)
 *
 * A row of zeros gives q = 0, scale = 0. A row that holds NaN or Inf gives q = 0, scale = NaN.
 */
#ifndef TRIMTAB_QUANTIZE_INT8_H_
#define TRIMTAB_QUANTIZE_INT8_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

/* x [M, K] of x_dtype, rows x_stride elements apart, the elements of a row adjacent
 * q [M, K] int8, rows q_stride apart;  scale [M] fp32 */
TT_API tt_status tt_quantize_int8(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                                  int64_t K, int8_t* q, int64_t q_stride, float* scale,
                                  const tt_parallel* parallel);

/* The same on a CUDA device. Any stride and alignment; 16-byte loads and stores where they allow it. */
TT_API tt_status tt_quantize_int8_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                                       int64_t K, int8_t* q, int64_t q_stride, float* scale,
                                       tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_QUANTIZE_INT8_H_ */
