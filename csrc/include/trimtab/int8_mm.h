/* int8_mm: exact scaled product of int8 matrices with a fused epilogue (NUMERICS.md section 3).
 *
 *   t = float(sum_k a[m,k] * b[n,k]);  t = t * b_scale[n];  t = t * a_scale[m];
 *   t = t + bias[n];  t = act(t);  out[m,n] = round(t)
 *
 * or, as the int8 input of the next product, whose a_scale is out_scale in every row:
 *
 *   r = 1 / out_scale;  out[m,n] = clamp(rne(t * r), -127, 127), and 0 where t * r is NaN
 *
 * Inf clamps to +-127. out_scale is meant to be finite and above 0: nothing checks it.
 */
#ifndef TRIMTAB_INT8_MM_H_
#define TRIMTAB_INT8_MM_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

/* (-128)^2 * K must stay below 2^31 for any int8 input: 131071. NUMERICS.md's 133144 holds for the
 * values quantize_int8 makes (+-127), and is the bound enforced. */
#define TT_INT8_MAX_K 133144

/* What follows the int32 sum. Sizes as in the product it belongs to. */
typedef struct tt_epilogue {
  const float* b_scale; /* [N] */
  const void* bias;     /* [N] of bias_dtype, or NULL */
  tt_dtype bias_dtype;
  tt_activation activation;
  void* out; /* [M, N] of out_dtype, rows out_stride elements apart */
  int64_t out_stride;
  tt_dtype out_dtype;
  const float* out_scale; /* [1], for out_dtype TT_I8; NULL for any other */
} tt_epilogue;

/* a [M, K] int8, rows a_stride apart;  b_packed from tt_int8_pack(b [N, K]);  a_scale [M] */
TT_API tt_status tt_int8_mm(const int8_t* a, int64_t a_stride, const float* a_scale,
                            const int8_t* b_packed, int64_t M, int64_t N, int64_t K,
                            const tt_epilogue* epilogue, const tt_parallel* parallel);

/* On a CUDA device b is plain [N, K], rows b_stride bytes apart. Tensor cores are fed at full speed where
 * a, b and their strides are multiples of 16 bytes; other operands work, slower.
 * workspace: tt_int8_mm_cuda_workspace(M, N, K) bytes, aligned to 256, its contents are not kept; NULL where
 * that is 0. It serves one call at a time. */
TT_API int64_t tt_int8_mm_cuda_workspace(int64_t M, int64_t N, int64_t K);
TT_API tt_status tt_int8_mm_cuda(const int8_t* a, int64_t a_stride, const float* a_scale,
                                 const int8_t* b, int64_t b_stride, int64_t M, int64_t N, int64_t K,
                                 const tt_epilogue* epilogue, void* workspace, tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_MM_H_ */
