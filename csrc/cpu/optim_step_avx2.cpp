#include "cpu/f32x8.h"
#include "cpu/optim_lanes.h"

namespace trimtab {

OptimKernels optim_kernels_avx2() { return optim_kernels<F32x8>(); }

}  // namespace trimtab
