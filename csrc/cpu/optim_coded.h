// Tensors with 8-bit states, block by block.
#pragma once
#include "cpu/optim_job.h"

namespace trimtab {

// Elements [begin, end) of a tensor without a mask, begin a multiple of kDynamicBlock; returns where whole
// blocks end.
int64_t update_coded(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s,
                     int64_t begin, int64_t end);

}  // namespace trimtab
