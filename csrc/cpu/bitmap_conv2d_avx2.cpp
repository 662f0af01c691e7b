#include "cpu/f32x8.h"

#include "cpu/bitmap_conv2d_lanes.h"

namespace trimtab {

const ConvKernel kConvAvx2 = conv_kernel<F32x8>();

}  // namespace trimtab
