/* int8_linear: quantize_int8 of x, int8_mm with the packed weight and its epilogue, in one call. */
#ifndef TRIMTAB_INT8_LINEAR_H_
#define TRIMTAB_INT8_LINEAR_H_
#include <trimtab/int8_mm.h>
#ifdef __cplusplus
extern "C" {
#endif

/* x [M, K] of x_dtype, rows x_stride elements apart;  b_packed from tt_int8_pack(b [N, K]) */
TT_API tt_status tt_int8_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                const int8_t* b_packed, int64_t M, int64_t N, int64_t K,
                                const tt_epilogue* epilogue, const tt_parallel* parallel);

/* On a CUDA device: two launches at most. b and workspace as for tt_int8_mm_cuda. */
TT_API int64_t tt_int8_linear_cuda_workspace(int64_t M, int64_t N, int64_t K);
TT_API tt_status tt_int8_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                     const int8_t* b, int64_t b_stride, int64_t M, int64_t N,
                                     int64_t K, const tt_epilogue* epilogue, void* workspace,
                                     tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_LINEAR_H_ */
