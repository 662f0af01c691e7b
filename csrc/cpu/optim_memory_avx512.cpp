#include "cpu/optim_coded_lanes.h"
#include "cpu/optim_halves_lanes.h"
#include "cpu/u32x16.h"

namespace trimtab {

OptimMemoryKernels optim_memory_avx512() {
  return optim_memory<F32x16>(optim_coded<F32x16>, optim_halves<F32x16>);
}

}  // namespace trimtab
