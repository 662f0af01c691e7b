#include "cpu/optim_memory_lanes.h"

namespace trimtab {

OptimMemoryKernels optim_memory_scalar() { return optim_memory<F32x1>(nullptr, nullptr); }

}  // namespace trimtab
