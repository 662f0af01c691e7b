#include "math/f32x1.h"

#include "cpu/block_linear_grad_lanes.h"

namespace trimtab {

bool block_grad_scalar(const GradTask& task) { return grad_lanes<F32x1, 4, 4, 8>(task); }

}  // namespace trimtab
