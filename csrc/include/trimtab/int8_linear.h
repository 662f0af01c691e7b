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

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_LINEAR_H_ */
