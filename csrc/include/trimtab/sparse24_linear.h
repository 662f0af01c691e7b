/* sparse24_linear: a 2:4 weight on a CUDA device, two of every four adjacent weights of a row kept.
 *
 *   out[m,n] = act(sum_k x[m,k] * w[n,k] + bias[n])           values bf16 or fp16, x and sums as below
 *   int8 values: x is quantized row by row (quantize_int8), then exactly int8_mm of the whole weight
 *
 * Float products are exact and summed in fp32 in an order of the kernel's own, the same in every run
 * (NUMERICS.md section 7). A weight that is not kept contributes nothing: 0 * Inf is not evaluated.
 * On a CPU a 2:4 weight is a bitmap weight (bitmap_linear.h).
 */
#ifndef TRIMTAB_SPARSE24_LINEAR_H_
#define TRIMTAB_SPARSE24_LINEAR_H_
#include <trimtab/int8_mm.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct tt_sparse24_weight {
  const void*
      values; /* [N, K4 / 2] of dtype, K4 = K rounded up to 4: the kept weights in their order */
  int64_t row_bytes; /* from row to row: a multiple of 16; values aligned to 16 */
  tt_dtype dtype; /* TT_BF16, TT_F16 or TT_I8 */
  /* [ceil(N / 16)][ceil(K / 64)][32] words: what the 32 lanes of a warp hand to mma.sp for 16 rows and 64
   * columns, aligned to 16 bytes. Four bits a group of four columns: the position of its first kept weight
   * in the lower two, that of the second, which is greater, above. Lane 4 g + i holds, lower group in lower
   * bits,
   *   bf16, fp16: of row g in the lower half and of row g + 8 in the upper, columns 16 i .. 16 i + 15
   *   int8:       of row g + 8 (i % 2), columns 32 (i / 2) .. 32 (i / 2) + 31
   * Sources: PTX ISA, "Matrix fragments for mma.sp.m16n8k32" (f16, bf16: the pair of lanes that the selector
   * names, 0 and 1 or 2 and 3) and ".m16n8k64" (u8, s8: all lanes). Checked against CUTLASS 4's layouts:
   * ELayout_64x32 and ELayout_64x64 of cute/atom/mma_traits_sm90_gmma_sparse.hpp (a warp of wgmma.sp has
   * 16 of its 64 rows, laid out as here), ELayout of 16x8x64 in mma_traits_sm120_sparse.hpp, and
   * against LLVM's mlir/test/.../GPU/CUDA/sparse-mma-2-4-f16.mlir, which runs on sm_80.
   * Rows from N on and columns from K on have any valid positions. */
  const uint32_t* metadata;
  int64_t N, K;
} tt_sparse24_weight;

/* x [M, K] of x_dtype, rows x_stride elements apart; of the weight's dtype, or any float with int8 values.
 * epilogue->b_scale [N] with int8 values, else NULL; out of float32, bfloat16 or float16.
 * workspace: tt_sparse24_linear_cuda_workspace(M, K, dtype) bytes, aligned to 256; NULL where that is 0.
 * Two launches with int8 values, one otherwise. */
TT_API int64_t tt_sparse24_linear_cuda_workspace(int64_t M, int64_t K, tt_dtype values_dtype);
TT_API tt_status tt_sparse24_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                         int64_t M, const tt_sparse24_weight* weight,
                                         const tt_epilogue* epilogue, void* workspace,
                                         tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_SPARSE24_LINEAR_H_ */
