#include "cpu/conv2d_check.h"

#include "cpu/int8_product.h"
#include "cpu/status.h"

namespace trimtab {

tt_status check_conv2d(const char* op, const tt_conv2d* s, const void* x, tt_dtype x_dtype) {
  if (s == nullptr || s->batch < 0 || s->channels < 1 || s->height < 0 || s->width < 0 ||
      s->out_channels < 1 || s->groups < 1 || s->kernel_h < 1 || s->kernel_w < 1 ||
      s->stride_h < 1 || s->stride_w < 1 || s->dilation_h < 1 || s->dilation_w < 1) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected channels, groups, kernel, stride and dilation >= 1", op);
  }
  if (s->pad_top < 0 || s->pad_bottom < 0 || s->pad_left < 0 || s->pad_right < 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected padding >= 0", op);
  }
  if (s->channels % s->groups != 0 || s->out_channels % s->groups != 0) {
    return set_error(
        TT_INVALID_ARGUMENT,
        "%s: expected groups that divide the channels, got %lld in, %lld out, groups %lld", op,
        (long long)s->channels, (long long)s->out_channels, (long long)s->groups);
  }
  if (tt_conv2d_out_height(s) < 1 || tt_conv2d_out_width(s) < 1) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a kernel no larger than the padded image, got kernel %lldx%lld "
                     "(dilation %lldx%lld) on %lldx%lld",
                     op, (long long)s->kernel_h, (long long)s->kernel_w, (long long)s->dilation_h,
                     (long long)s->dilation_w, (long long)(s->height + s->pad_top + s->pad_bottom),
                     (long long)(s->width + s->pad_left + s->pad_right));
  }
  if (dtype_size(x_dtype) == 0 || (x == nullptr && s->batch > 0 && s->height * s->width > 0)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, not NULL", op);
  }
  return TT_OK;
}

}  // namespace trimtab
