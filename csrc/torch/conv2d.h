// The arguments that the convolutions share: kernel_size, stride, padding, dilation, groups; memory formats.
#pragma once
#include <trimtab/int8_conv2d.h>

#include "adapter.h"

namespace trimtab {

using Ints = std::vector<int64_t>;

inline void check_ints(const char* op, const char* name, const Ints& values, size_t count,
                       int64_t least) {
  bool good = values.size() == count;
  for (const int64_t value : values) good = good && value >= least;
  std::string text;
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  TT_CHECK(good, op, ": expected ", name, " of ", count, " integers >= ", least, ", got [", text,
           "]");
}

inline tt_conv2d weight_shape(const char* op, int64_t O, int64_t C, int64_t kernel_h,
                              int64_t kernel_w, int64_t groups) {
  TT_CHECK(O > 0 && C > 0 && kernel_h > 0 && kernel_w > 0, op,
           ": expected channels and kernel sizes >= 1, got out ", O, ", in ", C, ", kernel ",
           kernel_h, "x", kernel_w);
  TT_CHECK(groups > 0 && C % groups == 0 && O % groups == 0, op, ": expected groups that divide ",
           C, " input and ", O, " output channels, got ", groups);
  return {0, C, 0, 0, O, groups, kernel_h, kernel_w, 1, 1, 0, 0, 0, 0, 1, 1};
}

// The shape of conv2d(x [B, C, H, W], ...), all of it checked; padding is [top, bottom, left, right].
inline tt_conv2d image_shape(const char* op, const Tensor& x, int64_t O, const Ints& kernel_size,
                             const Ints& stride, const Ints& padding, const Ints& dilation,
                             int64_t groups) {
  TT_CHECK(x.dim() == 4, op, ": expected x [B, C, H, W], got ", describe(x));
  check_ints(op, "kernel_size", kernel_size, 2, 1);
  check_ints(op, "stride", stride, 2, 1);
  check_ints(op, "padding", padding, 4, 0);
  check_ints(op, "dilation", dilation, 2, 1);
  const auto n = x.sizes();
  tt_conv2d shape = weight_shape(op, O, n[1], kernel_size[0], kernel_size[1], groups);
  shape.batch = n[0], shape.height = n[2], shape.width = n[3];
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_top = padding[0], shape.pad_bottom = padding[1];
  shape.pad_left = padding[2], shape.pad_right = padding[3];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  TT_CHECK(tt_conv2d_out_height(&shape) > 0 && tt_conv2d_out_width(&shape) > 0, op,
           ": expected a kernel no larger than the padded image, got kernel ", kernel_size[0], "x",
           kernel_size[1], " with dilation ", dilation[0], "x", dilation[1], " on ",
           n[2] + padding[0] + padding[1], "x", n[3] + padding[2] + padding[3]);
  return shape;
}

// Whether each image of x lies as [H][W][C], or as [C][H][W].
inline bool images_are(const Tensor& x, bool channels_last) {
  const auto n = x.sizes(), s = x.strides();
  const int64_t c = channels_last ? 1 : n[2] * n[3], w = channels_last ? n[1] : 1, h = w * n[3];
  return (n[1] <= 1 || s[1] == c) && (n[2] <= 1 || s[2] == h) && (n[3] <= 1 || s[3] == w);
}

inline bool is_channels_last(const Tensor& x) {
  const auto n = x.sizes();
  return !x.is_contiguous() && images_are(x, true) &&
         (n[0] <= 1 || x.strides()[0] == n[1] * n[2] * n[3]);
}

}  // namespace trimtab
