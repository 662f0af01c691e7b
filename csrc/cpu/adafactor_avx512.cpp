#include "cpu/adafactor_lanes.h"
#include "cpu/f32x16.h"

namespace trimtab {

AdafactorKernels adafactor_kernels_avx512() { return adafactor_kernels<F32x16>(); }

}  // namespace trimtab
