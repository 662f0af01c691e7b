#include "cpu/adafactor_lanes.h"
#include "math/f32x1.h"

namespace trimtab {

AdafactorKernels adafactor_kernels_scalar() { return adafactor_kernels<F32x1>(); }

}  // namespace trimtab
