#include "cpu/f32x16.h"
#include "cpu/int8_conv2d_lanes.h"

namespace trimtab {

const ConvLanes conv_lanes_avx512 = {absmax<F32x16>, quantize<F32x16>, depthwise};

}  // namespace trimtab
