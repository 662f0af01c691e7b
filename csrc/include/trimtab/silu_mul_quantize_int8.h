/* silu_mul_quantize_int8: a gated activation, quantized on its way out; gate and up are read once.
 *
 *   y[m,k] = silu(gate[m,k]) * up[m,k]      fp32, not rounded to the input dtype in between
 *   q, scale = quantize_int8(y)             (NUMERICS.md sections 2 and 4)
 */
#ifndef TRIMTAB_SILU_MUL_QUANTIZE_INT8_H_
#define TRIMTAB_SILU_MUL_QUANTIZE_INT8_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

/* gate, up [M, K] of dtype, rows gate_stride and up_stride elements apart
 * q [M, K] int8, rows q_stride apart;  scale [M] fp32 */
TT_API tt_status tt_silu_mul_quantize_int8(const void* gate, int64_t gate_stride, const void* up,
                                           int64_t up_stride, tt_dtype dtype, int64_t M, int64_t K,
                                           int8_t* q, int64_t q_stride, float* scale,
                                           const tt_parallel* parallel);

TT_API tt_status tt_silu_mul_quantize_int8_cuda(const void* gate, int64_t gate_stride,
                                                const void* up, int64_t up_stride, tt_dtype dtype,
                                                int64_t M, int64_t K, int8_t* q, int64_t q_stride,
                                                float* scale, tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_SILU_MUL_QUANTIZE_INT8_H_ */
