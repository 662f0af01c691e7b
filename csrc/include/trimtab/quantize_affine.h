/* quantize_affine: b bits (2 to 8) with a zero point, one scale and zero point a group of a row
 * (NUMERICS.md section 2: the min/max formula).
 *
 *   lo = min(0, min x);  hi = max(0, max x);  levels = 2^bits - 1
 *   scale = (hi - lo) / levels;  inverse = levels / (hi - lo);  zero_point = rne(-lo * inverse)
 *   q = min(rne(x * inverse) + zero_point, levels);   back: (q - zero_point) * scale
 *
 * A group of zeros (or with a range so small that inverse overflows) gives q = 0, scale = 0,
 * zero_point = 0. One that holds NaN or Inf gives q = 0, zero_point = 0, scale = NaN.
 */
#ifndef TRIMTAB_QUANTIZE_AFFINE_H_
#define TRIMTAB_QUANTIZE_AFFINE_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

/* A quantized [M, K] matrix. groups = tt_affine_groups(K, group). */
typedef struct tt_affine {
  int32_t bits;        /* 2..8: codes are 0..2^bits - 1, a byte each whatever bits is */
  int64_t group; /* adjacent elements of a row that share a scale, >= 1; the last group of a row
                          may be shorter. K or more: one a row */
  uint8_t* q; /* [M, K], rows q_stride apart */
  int64_t q_stride;
  float* scale; /* [M, groups] */
  uint8_t* zero_point; /* [M, groups] */
} tt_affine;

/* Groups of a row of K elements: ceil(K / group), and one of an empty row. */
TT_API int64_t tt_affine_groups(int64_t K, int64_t group);

/* x [M, K] of x_dtype, rows x_stride elements apart, the elements of a row adjacent */
TT_API tt_status tt_quantize_affine(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                                    int64_t K, const tt_affine* to, const tt_parallel* parallel);

/* The inverse, rounded once to out_dtype: out [M, K], rows out_stride elements apart. `bits` is not
 * read. */
TT_API tt_status tt_dequantize_affine(const tt_affine* from, int64_t M, int64_t K, void* out,
                                      tt_dtype out_dtype, int64_t out_stride,
                                      const tt_parallel* parallel);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_QUANTIZE_AFFINE_H_ */
