// What every convolution asks of its shape and image.
#pragma once
#include <trimtab/int8_conv2d.h>

namespace trimtab {

// TT_INVALID_ARGUMENT with a message for sizes, groups, a kernel larger than the padded image, dtype or NULL.
tt_status check_conv2d(const char* op, const tt_conv2d* shape, const void* x, tt_dtype x_dtype);

}  // namespace trimtab
