/* bitmap_linear: activations times an unstructured sparse weight, its kept values and a bit mask.
 *
 *   t = sum over kept k of x[m,k] * w[n,k];   out[m,n] = round(act(t + bias[n]))
 *
 * Float values: the sum is fp32 in an order of its own for every kernel, the same from run to run and for
 * every thread count (NUMERICS.md section 7). A pruned weight contributes nothing: 0 * Inf is not evaluated.
 * int8 values: x is quantized row by row (quantize_int8), the sum is exact, and what follows it is
 * int8_mm's, so the result has the bits of int8_linear with the dense weight.
 */
#ifndef TRIMTAB_BITMAP_LINEAR_H_
#define TRIMTAB_BITMAP_LINEAR_H_
#include <trimtab/int8_mm.h>
#ifdef __cplusplus
extern "C" {
#endif

/* A weight [N, K]. Kept weights stand row by row, in rising order of k; one may have the value zero. */
typedef struct tt_bitmap {
  const void* values; /* [count] of dtype */
  tt_dtype dtype;     /* TT_F32, TT_BF16, TT_F16 or TT_I8 */
  const uint8_t*
      bits; /* [N, 8 * ceil(K / 64)]: k is bit k % 8 of byte k / 8; bits past K are zero */
  const int64_t* row_start; /* [N + 1]: kept weights before row n; row_start[N] = count */
  int64_t count;
} tt_bitmap;

/* Bytes of a row of bits. */
TT_API int64_t tt_bitmap_row_bytes(int64_t K);

/* x [M, K] of x_dtype, rows x_stride elements apart; x_dtype is that of float values.
 * epilogue->b_scale [N] with int8 values, NULL with others; out of any float dtype.
 * That the bits agree with row_start is the caller's to know (bitmap_check in Python). */
TT_API tt_status tt_bitmap_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                  const tt_bitmap* weight, int64_t M, int64_t N, int64_t K,
                                  const tt_epilogue* epilogue, const tt_parallel* parallel);

/* The same on a CUDA device, for few rows, where reading the weight is the cost:
 * M <= TT_BITMAP_LINEAR_CUDA_MAX_M, more is TT_UNSUPPORTED. values aligned to 16 bytes, bits to 8. Whatever
 * bits and row_start hold, nothing outside of values is read.
 * workspace: tt_bitmap_linear_cuda_workspace(M, K, dtype) bytes, aligned to 256; NULL where that is 0.
 * Two launches with int8 values, one otherwise. */
#define TT_BITMAP_LINEAR_CUDA_MAX_M 32
TT_API int64_t tt_bitmap_linear_cuda_workspace(int64_t M, int64_t K, tt_dtype values_dtype);
TT_API tt_status tt_bitmap_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                       const tt_bitmap* weight, int64_t M, int64_t N, int64_t K,
                                       const tt_epilogue* epilogue, void* workspace,
                                       tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_BITMAP_LINEAR_H_ */
