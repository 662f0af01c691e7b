/* block_linear: a linear layer whose weight [N, K] is block-sparse (BSR), on the CPU, and its gradients.
 *
 *   t[m,n] = sum over the kept blocks of row n of x[m,k] * w[n,k]
 *   float32, bfloat16, float16 values:  t summed in float32;  out = act(t + bias[n])
 *   int8 values:  x quantized row by row, t exact in int32, scaled and finished as int8_mm does
 *
 * Weights of blocks that are not kept are not evaluated: an Inf of x that meets none but those leaves no
 * NaN. bfloat16 on AMX takes subnormal inputs and sums as zero, as the instruction does.
 */
#ifndef TRIMTAB_BLOCK_LINEAR_H_
#define TRIMTAB_BLOCK_LINEAR_H_
#include <trimtab/int8_mm.h>
#ifdef __cplusplus
extern "C" {
#endif

/* Rows of blocks R = ceil(N / bn), columns C = ceil(K / bk); what a block has beyond N is not computed, what
 * it has beyond K meets zeros. */
typedef struct tt_block_weight {
  const void* values; /* [blocks, bn, bk] of dtype, the kept blocks row by row; TT_I8 too */
  tt_dtype dtype;
  const int32_t* crow; /* [R + 1], rising from 0 to blocks: where each row of blocks begins */
  const int32_t* col; /* [blocks], each in [0, C) */
  int64_t blocks, bn, bk, N, K;
} tt_block_weight;

/* x [M, K] of x_dtype, rows x_stride elements apart. Float values: of x_dtype, and epilogue->b_scale is NULL;
 * int8 values: b_scale [N]. epilogue->out_dtype is a float one. */
TT_API tt_status tt_block_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                 const tt_block_weight* weight, int64_t M,
                                 const tt_epilogue* epilogue, const tt_parallel* parallel);

/* On a CUDA device: blocks of 16 x 16, 32 x 32 and 64 x 64 in bf16, fp16 and int8 by the tensor cores, which want
 * values and float rows of x aligned to 16 bytes (else TT_UNSUPPORTED); others and float32 by multiply-adds, at any
 * address. Whatever crow and col hold, nothing outside the operands is read.
 * workspace: tt_block_linear_cuda_workspace(weight, M) bytes, aligned to 256, its contents are not kept; NULL
 * where that is 0. It serves one call at a time. */
TT_API int64_t tt_block_linear_cuda_workspace(const tt_block_weight* weight, int64_t M);
TT_API tt_status tt_block_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                      const tt_block_weight* weight, int64_t M,
                                      const tt_epilogue* epilogue, void* workspace,
                                      tt_stream stream);

/* grad_x [M, K] (rows K apart) = grad [M, N] times the weight; all of weight->dtype, a float one. */
TT_API tt_status tt_block_grad_x(const void* grad, int64_t grad_stride,
                                 const tt_block_weight* weight, int64_t M, void* grad_x,
                                 const tt_parallel* parallel);

/* grad_values [blocks, bn, bk] = grad^T x at the kept blocks, summed over M in float32 and rounded once;
 * weight->values is not read. Elements beyond N or K are zero. */
TT_API tt_status tt_block_grad_values(const void* grad, int64_t grad_stride, const void* x,
                                      int64_t x_stride, const tt_block_weight* weight, int64_t M,
                                      void* grad_values, const tt_parallel* parallel);

/* On a CUDA device, for any blocks; rows of grad and x aligned to 16 bytes (else TT_UNSUPPORTED). The order of a
 * sum is the same in every run. Nothing outside the operands is read or written, whatever crow and col hold.
 * workspace as above, of tt_block_grad_values_cuda_workspace(weight, M) bytes. */
TT_API int64_t tt_block_grad_values_cuda_workspace(const tt_block_weight* weight, int64_t M);
TT_API tt_status tt_block_grad_values_cuda(const void* grad, int64_t grad_stride, const void* x,
                                           int64_t x_stride, const tt_block_weight* weight,
                                           int64_t M, void* grad_values, void* workspace,
                                           tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_BLOCK_LINEAR_H_ */
