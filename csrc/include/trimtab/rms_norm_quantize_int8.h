/* rms_norm_quantize_int8: RMSNorm, quantized on its way out; x is read once.
 *
 *   r = 1 / sqrt(mean_k x[m,k]^2 + eps);  y[m,k] = (x[m,k] * r) * weight[k]
 *   q, scale = quantize_int8(y)
 *
 * fp32, y not rounded to the input dtype in between. The order in which the squares are added is fixed
 * (csrc/math/rms_norm.h), so every device gives the same bits.
 */
#ifndef TRIMTAB_RMS_NORM_QUANTIZE_INT8_H_
#define TRIMTAB_RMS_NORM_QUANTIZE_INT8_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

/* x [M, K] of x_dtype, rows x_stride elements apart;  weight [K] of weight_dtype: fp32 or x_dtype
 * q [M, K] int8, rows q_stride apart;  scale [M] fp32 */
TT_API tt_status tt_rms_norm_quantize_int8(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                           const void* weight, tt_dtype weight_dtype, float eps,
                                           int64_t M, int64_t K, int8_t* q, int64_t q_stride,
                                           float* scale, const tt_parallel* parallel);

TT_API tt_status tt_rms_norm_quantize_int8_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                                const void* weight, tt_dtype weight_dtype,
                                                float eps, int64_t M, int64_t K, int8_t* q,
                                                int64_t q_stride, float* scale, tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_RMS_NORM_QUANTIZE_INT8_H_ */
