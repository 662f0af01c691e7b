#include "cpu/optim_memory_lanes.h"
#include "cpu/u32x8.h"

namespace trimtab {

OptimMemoryKernels optim_memory_avx2() { return optim_memory<F32x8>(); }

}  // namespace trimtab
