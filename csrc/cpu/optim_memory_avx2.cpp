#include "cpu/optim_coded_lanes.h"
#include "cpu/optim_halves_lanes.h"
#include "cpu/u32x8.h"

namespace trimtab {

OptimMemoryKernels optim_memory_avx2() {
  return optim_memory<F32x8>(optim_coded<F32x8>, optim_halves<F32x8>);
}

}  // namespace trimtab
