#include "cpu/f32x8.h"
#include "cpu/int8_conv2d_lanes.h"

namespace trimtab {

const ConvLanes conv_lanes_avx2 = {absmax<F32x8>, quantize<F32x8>, depthwise};

}  // namespace trimtab
