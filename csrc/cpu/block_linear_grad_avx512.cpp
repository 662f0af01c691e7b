#include "cpu/f32x16.h"

#include "cpu/block_linear_grad_lanes.h"

namespace trimtab {

bool block_grad_avx512(const GradTask& task) { return grad_lanes<F32x16, 8, 2, 8>(task); }

}  // namespace trimtab
