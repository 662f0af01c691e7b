#include "cpu/adafactor_lanes.h"
#include "cpu/f32x8.h"

namespace trimtab {

AdafactorKernels adafactor_kernels_avx2() { return adafactor_kernels<F32x8>(); }

}  // namespace trimtab
