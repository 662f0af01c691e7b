#include "cpu/optim_lanes.h"
#include "math/f32x1.h"

namespace trimtab {

OptimKernels optim_kernels_scalar() { return optim_kernels<F32x1>(); }

}  // namespace trimtab
