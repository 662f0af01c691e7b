/* int8_weight_mm: float activations times an int8 weight, the scale in the epilogue.
 *
 *   acc = 0;  for k in group g, rising:  acc = fma(x[m,k], float(b[n,k] - zero_point[g,n]), acc)
 *   t = 0;    for g rising:              t = fma(acc_g, scale[g,n], t)
 *   t = t + bias[n] (only if there is a bias);  out[m,n] = round(act(t))
 *
 * All in fp32, x widened exactly. The order of the sum is fixed, so every CPU instruction set gives the
 * same bits, for every batch size and thread count.
 */
#ifndef TRIMTAB_INT8_WEIGHT_MM_H_
#define TRIMTAB_INT8_WEIGHT_MM_H_
#include <trimtab/int8_mm.h>
#ifdef __cplusplus
extern "C" {
#endif

/* x [M, K] of x_dtype, rows x_stride elements apart;  b_packed from tt_int8_pack(b [N, K])
 * group: columns of K that share a scale, a multiple of 4; K for one scale a row
 * epilogue->b_scale [groups, N]: group-major, so that one group's scales are adjacent
 * zero_point [groups, N] int8, in the units of b, or NULL for none */
TT_API tt_status tt_int8_weight_mm(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                   const int8_t* b_packed, int64_t group, const int8_t* zero_point,
                                   int64_t M, int64_t N, int64_t K, const tt_epilogue* epilogue,
                                   const tt_parallel* parallel);

/* On a CUDA device b is plain [N, K], rows b_stride bytes apart; the order of the sum is the kernel's own,
 * the same for every run (NUMERICS.md section 7). Made for few rows, where reading the weight is the cost:
 * M <= TT_INT8_WEIGHT_MM_CUDA_MAX_M, more is TT_UNSUPPORTED. */
#define TT_INT8_WEIGHT_MM_CUDA_MAX_M 64
TT_API tt_status tt_int8_weight_mm_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                        const int8_t* b, int64_t b_stride, int64_t group,
                                        const int8_t* zero_point, int64_t M, int64_t N, int64_t K,
                                        const tt_epilogue* epilogue, tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_WEIGHT_MM_H_ */
