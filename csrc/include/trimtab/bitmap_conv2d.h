/* bitmap_conv2d: 2-D convolution with an unstructured sparse weight, its kept values and a bit mask.
 *
 *   t = sum over kept (c,kh,kw) of x[b, g * C/G + c, i*stride_h + kh*dilation_h - top, ...] * w[o,c,kh,kw]
 *   out[b,o,i,j] = round(act(t + bias[o])),  g the group of o; padding is zeros
 *
 * The sum is fp32 in rising order of (c, kh, kw), whatever the thread count, the sizes of the image and the
 * number of images (NUMERICS.md section 7). A pruned weight contributes nothing: 0 * Inf is not evaluated.
 */
#ifndef TRIMTAB_BITMAP_CONV2D_H_
#define TRIMTAB_BITMAP_CONV2D_H_
#include <trimtab/bitmap_linear.h>
#include <trimtab/int8_conv2d.h>
#ifdef __cplusplus
extern "C" {
#endif

/* x: images x_stride elements apart, each dense [C][H][W], of the dtype of the values, which are float
 * weight: the matrix [N, K] = [out_channels, C / groups * kernel_h * kernel_w]
 * epilogue: out dense [B][O][OH][OW] of any float dtype (out_stride is not read); no b_scale
 * That the bits agree with row_start is the caller's to know; where they do not, nothing is read or
 * written out of bounds. */
TT_API tt_status tt_bitmap_conv2d(const tt_conv2d* conv, const void* x, tt_dtype x_dtype,
                                  int64_t x_stride, const tt_bitmap* weight,
                                  const tt_epilogue* epilogue, const tt_parallel* parallel);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_BITMAP_CONV2D_H_ */
