#include "cpu/f32x16.h"
#include "cpu/optim_lanes.h"

namespace trimtab {

OptimKernels optim_kernels_avx512() { return optim_kernels<F32x16>(); }

}  // namespace trimtab
