#include "cpu/f32x16.h"

#include "cpu/bitmap_conv2d_lanes.h"

namespace trimtab {

const ConvKernel kConvAvx512 = conv_kernel<F32x16>();

}  // namespace trimtab
