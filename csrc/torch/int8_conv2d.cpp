// out [B, O, OH, OW] = int8_conv2d(x [B, C, H, W], weight [O, C / groups, kh, kw] int8 or packed, ...)
//
// padding is [top, bottom, left, right]. out is channels-last if x is (and not contiguous as well).
// The overload "inference" is the same function without an autograd rule, as int8_linear's.
#include <trimtab/int8_conv2d.h>

#include "adapter.h"
#include "conv2d.h"
#include "epilogue.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_conv2d";

tt_conv2d shape_of(const char* op, const Tensor& weight, int64_t groups) {
  check_tensor(op, "weight", weight, ScalarType::Char, 4);
  const auto sizes = weight.sizes();
  return weight_shape(op, sizes[0], sizes[1] * groups, sizes[2], sizes[3], groups);
}

Tensor pack(const tt_conv2d& shape, const Tensor& weight) {
  const Tensor plain = torch::stable::contiguous(weight);
  const int64_t bytes = tt_int8_conv2d_packed_size(&shape);
  const Tensor packed = empty_cpu(&bytes, 1, ScalarType::Char);
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_conv2d_pack(&shape, static_cast<const int8_t*>(plain.const_data_ptr()),
                                   static_cast<int8_t*>(packed.mutable_data_ptr()), &pool));
  return packed;
}

void check_packed(const char* op, const tt_conv2d& shape, const Tensor& packed) {
  check_tensor(op, "a packed weight", packed, ScalarType::Char, 1);
  const int64_t bytes = tt_int8_conv2d_packed_size(&shape);
  TT_CHECK(packed.numel() == bytes && packed.is_contiguous(), op,
           ": expected a contiguous packed weight of ", bytes,
           " bytes (from int8_conv2d_pack), got ", describe(packed));
}

Tensor int8_conv2d_pack(const Tensor& weight, int64_t groups) {
  return pack(shape_of("int8_conv2d_pack", weight, groups), weight);
}

Tensor int8_conv2d_unpack(const Tensor& packed, Ints sizes, int64_t groups) {
  constexpr const char* op = "int8_conv2d_unpack";
  check_ints(op, "sizes", sizes, 4, 1);
  const tt_conv2d shape = weight_shape(op, sizes[0], sizes[1] * groups, sizes[2], sizes[3], groups);
  check_packed(op, shape, packed);
  const Tensor out = empty_cpu(sizes.data(), 4, ScalarType::Char);
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_conv2d_unpack(&shape, static_cast<const int8_t*>(packed.const_data_ptr()),
                                     static_cast<int8_t*>(out.mutable_data_ptr()), &pool));
  return out;
}

struct ConvArgs {
  tt_conv2d shape;
  Tensor x, packed;
  tt_dtype dtype;
  bool channels_last, x_channels_last;
  EpilogueArgs epilogue;

  ConvArgs(const Tensor& x_any, const Tensor& weight, const Tensor& weight_scale,
           const std::optional<Tensor>& bias, const Ints& kernel_size, const Ints& stride,
           const Ints& padding, const Ints& dilation, int64_t groups, int64_t activation)
      : x(x_any),
        packed(weight),
        dtype(float_dtype(kOp, "x", x_any)),
        epilogue(kOp, "weight_scale", weight_scale, bias, activation, Place::cpu()) {
    TT_CHECK(x.is_cpu() && weight.is_cpu(), kOp, ": expected x and weight on the CPU");
    shape = image_shape(kOp, x, epilogue.N, kernel_size, stride, padding, dilation, groups);
    take_weight(weight);
    channels_last = is_channels_last(x);
    x_channels_last = !images_are(x, false);
    if (x_channels_last && !images_are(x, true)) {
      x = torch::stable::contiguous(x);
      x_channels_last = false;
    }
  }

  void take_weight(const Tensor& weight) {
    if (weight.dim() == 1) return check_packed(kOp, shape, weight);
    check_tensor(kOp, "weight", weight, ScalarType::Char, 4);
    const int64_t wanted[] = {shape.out_channels, shape.channels / shape.groups, shape.kernel_h,
                              shape.kernel_w};
    for (int d = 0; d < 4; ++d) {
      TT_CHECK(weight.sizes()[d] == wanted[d], kOp, ": expected weight [O=", wanted[0],
               ", C/groups=", wanted[1], ", ", wanted[2], ", ", wanted[3],
               "] int8 or its packed form, got ", describe(weight));
    }
    packed = pack(shape, weight);
  }

  Ints out_sizes() const {
    return {shape.batch, shape.out_channels, tt_conv2d_out_height(&shape),
            tt_conv2d_out_width(&shape)};
  }

  void run(const Tensor& out, bool out_channels_last) const {
    const tt_epilogue into = epilogue.into(out);
    const tt_parallel pool = torch_pool();
    check_status(tt_int8_conv2d(&shape, x.const_data_ptr(), dtype, x.strides()[0], x_channels_last,
                                static_cast<const int8_t*>(packed.const_data_ptr()), &into,
                                out_channels_last, &pool));
  }
};

Tensor empty_channels_last(const Ints& n, ScalarType dtype) {
  const Ints strides = {n[1] * n[2] * n[3], 1, n[1] * n[3], n[1]};
  return empty_strided_cpu(n.data(), strides.data(), 4, dtype);
}

Tensor int8_conv2d(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   std::optional<Tensor> bias, Ints kernel_size, Ints stride, Ints padding,
                   Ints dilation, int64_t groups, int64_t activation,
                   std::optional<ScalarType> out_dtype) {
  const ConvArgs args(x, weight, weight_scale, bias, kernel_size, stride, padding, dilation, groups,
                      activation);
  const Ints sizes = args.out_sizes();
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  const Tensor out =
      args.channels_last ? empty_channels_last(sizes, dtype) : empty_cpu(sizes.data(), 4, dtype);
  float_dtype(kOp, "out", out);
  args.run(out, args.channels_last);
  return out;
}

void int8_conv2d_out(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                     std::optional<Tensor> bias, Ints kernel_size, Ints stride, Ints padding,
                     Ints dilation, int64_t groups, int64_t activation, Tensor out) {
  const ConvArgs args(x, weight, weight_scale, bias, kernel_size, stride, padding, dilation, groups,
                      activation);
  const Ints sizes = args.out_sizes();
  float_dtype(kOp, "out", out);
  const bool last = out.dim() == 4 && is_channels_last(out);
  if (!last) check_out(kOp, "out", out, out.scalar_type(), sizes.data(), 4);
  for (int d = 0; d < 4; ++d) {
    TT_CHECK(out.sizes()[d] == sizes[size_t(d)], kOp, ": expected out [", sizes[0], ", ", sizes[1],
             ", ", sizes[2], ", ", sizes[3], "], got ", describe(out));
  }
  args.run(out, last);
}

}  // namespace

#define TT_CONV_ARGUMENTS                                                                         \
  "Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int[] kernel_size, int[] stride, " \
  "int[] padding, int[] dilation, int groups, int activation=0, "

TT_OPS(m) {
  m.def("int8_conv2d(" TT_CONV_ARGUMENTS "ScalarType? out_dtype=None) -> Tensor");
  m.def("int8_conv2d.inference(" TT_CONV_ARGUMENTS "ScalarType? out_dtype=None) -> Tensor");
  m.def("int8_conv2d.out(" TT_CONV_ARGUMENTS "*, Tensor(a!) out) -> ()");
  m.def("int8_conv2d_pack(Tensor weight, int groups) -> Tensor");
  m.def("int8_conv2d_unpack(Tensor packed, int[] sizes, int groups) -> Tensor");
}

TT_CPU_OPS(m) {
  m.impl("int8_conv2d", TORCH_BOX(&int8_conv2d));
  m.impl("int8_conv2d.inference", TORCH_BOX(&int8_conv2d));
  m.impl("int8_conv2d.out", TORCH_BOX(&int8_conv2d_out));
  m.impl("int8_conv2d_pack", TORCH_BOX(&int8_conv2d_pack));
  m.impl("int8_conv2d_unpack", TORCH_BOX(&int8_conv2d_unpack));
}

}  // namespace trimtab
