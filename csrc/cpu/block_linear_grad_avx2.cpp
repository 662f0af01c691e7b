#include "cpu/f32x8.h"

#include "cpu/block_linear_grad_lanes.h"

namespace trimtab {

bool block_grad_avx2(const GradTask& task) { return grad_lanes<F32x8, 4, 2, 8>(task); }

}  // namespace trimtab
