/* int8_conv2d: 2-D convolution, activations quantized with one scale an image.
 *
 *   a_scale[b], q[b] = quantize_int8(x[b] as one row of C * H * W);  padding is an exact zero
 *   acc[b,o,i,j] = sum_{kh,kw,c} q[b, c, i*stride_h + kh*dilation_h - top, ...] * w[o,c,kh,kw]
 *   t = float(acc);  t = t * b_scale[o];  t = t * a_scale[b];  t = t + bias[o];  out = round(act(t))
 *
 * That is int8_mm over the image's patches as rows (im2col), bit for bit.
 */
#ifndef TRIMTAB_INT8_CONV2D_H_
#define TRIMTAB_INT8_CONV2D_H_
#include <trimtab/int8_mm.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct tt_conv2d {
  int64_t batch, channels, height, width; /* of x [B, C, H, W] */
  int64_t out_channels, groups;           /* w [O, C / groups, kernel_h, kernel_w] */
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t dilation_h, dilation_w;
} tt_conv2d;

/* Rows and columns of the output; 0 where the kernel is larger than the padded image. */
TT_API int64_t tt_conv2d_out_height(const tt_conv2d* conv);
TT_API int64_t tt_conv2d_out_width(const tt_conv2d* conv);

/* Bytes of the packed weight, and whether it is the depthwise form: C = O = groups.
 *
 *   depthwise: packed[kh][kw][o]
 *   else: a group after the other, each int8_pack of [O / groups, (kh, kw, c)], one
 *   TT_INT8_PACK_TAIL of zeros at the end; groups of few outputs are merged, block-diagonally, until
 *   they fill a panel of 16
 *
 * Only out_channels, channels, groups and the kernel's size are read. */
TT_API int64_t tt_int8_conv2d_packed_size(const tt_conv2d* conv);

/* w [O, C / groups, kernel_h, kernel_w] int8, contiguous <-> packed, 64-byte aligned */
TT_API tt_status tt_int8_conv2d_pack(const tt_conv2d* conv, const int8_t* w, int8_t* packed,
                                     const tt_parallel* parallel);
TT_API tt_status tt_int8_conv2d_unpack(const tt_conv2d* conv, const int8_t* packed, int8_t* w,
                                       const tt_parallel* parallel);

/* x: images x_stride elements apart, each dense: [C][H][W], or [H][W][C] if x_channels_last
 * b_packed from tt_int8_conv2d_pack
 * epilogue: sizes by N = O; out dense [B][O][OH][OW], or [B][OH][OW][O] if out_channels_last
 *   (out_stride is not read) */
TT_API tt_status tt_int8_conv2d(const tt_conv2d* conv, const void* x, tt_dtype x_dtype,
                                int64_t x_stride, int32_t x_channels_last, const int8_t* b_packed,
                                const tt_epilogue* epilogue, int32_t out_channels_last,
                                const tt_parallel* parallel);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_CONV2D_H_ */
