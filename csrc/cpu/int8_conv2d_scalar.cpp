#include "cpu/int8_conv2d_lanes.h"
#include "math/f32x1.h"

namespace trimtab {

const ConvLanes conv_lanes_scalar = {absmax<F32x1>, quantize<F32x1>, depthwise};

}  // namespace trimtab
