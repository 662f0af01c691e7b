// out [B, O, OH, OW] = bitmap_conv2d(x [B, C, H, W], values [kept], bitmap [O, 8 ceil(K/64)], ...)
//
// K = C / groups * kh * kw; padding is [top, bottom, left, right]. out is contiguous.
// The overload "inference" is the same function without an autograd rule (see int8_linear.cpp).
#include <trimtab/bitmap_conv2d.h>

#include "bitmap.h"
#include "conv2d.h"
#include "sparse.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "bitmap_conv2d";

Tensor bitmap_conv2d(const Tensor& x, const Tensor& values, const Tensor& bitmap,
                     const Tensor& row_start, std::optional<Tensor> bias, Ints kernel_size,
                     Ints stride, Ints padding, Ints dilation, int64_t groups, int64_t activation) {
  const Place place = Place::cpu();
  check_tensor(kOp, "bitmap", bitmap, ScalarType::Byte, 2, place);
  const int64_t O = bitmap.sizes()[0];
  TT_CHECK(values.scalar_type() != ScalarType::Char, kOp,
           ": expected values of the dtype of x, got ", describe(values));
  const SparseArgs args(kOp, x, values, std::nullopt, bias, activation, O, place);
  const tt_conv2d shape = image_shape(kOp, x, O, kernel_size, stride, padding, dilation, groups);
  const int64_t K = shape.channels / groups * shape.kernel_h * shape.kernel_w;
  const tt_bitmap weight = bitmap_of(kOp, values, bitmap, row_start, args.values_dtype, K, place);
  const Tensor images = images_are(x, false) ? x : torch::stable::contiguous(x);
  const int64_t sizes[] = {shape.batch, O, tt_conv2d_out_height(&shape),
                           tt_conv2d_out_width(&shape)};
  const Tensor out = empty_cpu(sizes, 4, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_bitmap_conv2d(&shape, images.const_data_ptr(), args.x_dtype, images.strides()[0],
                                &weight, &into, &pool));
  return out;
}

}  // namespace

#define TT_BITMAP_CONV_ARGUMENTS                                                                \
  "Tensor x, Tensor values, Tensor bitmap, Tensor row_start, Tensor? bias, int[] kernel_size, " \
  "int[] stride, int[] padding, int[] dilation, int groups, int activation=0"

TT_OPS(m) {
  m.def("bitmap_conv2d(" TT_BITMAP_CONV_ARGUMENTS ") -> Tensor");
  m.def("bitmap_conv2d.inference(" TT_BITMAP_CONV_ARGUMENTS ") -> Tensor");
}

TT_CPU_OPS(m) {
  m.impl("bitmap_conv2d", TORCH_BOX(&bitmap_conv2d));
  m.impl("bitmap_conv2d.inference", TORCH_BOX(&bitmap_conv2d));
}

}  // namespace trimtab
