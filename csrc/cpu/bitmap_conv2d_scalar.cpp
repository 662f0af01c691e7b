#include "math/f32x1.h"

#include "cpu/bitmap_conv2d_lanes.h"

namespace trimtab {

const ConvKernel kConvScalar = conv_kernel<F32x1>();

}  // namespace trimtab
