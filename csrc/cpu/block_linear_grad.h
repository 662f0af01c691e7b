// The kernels of block_grad_values: grad^T x at the kept blocks.
#pragma once
#include <trimtab/block_linear.h>

namespace trimtab {

// Some rows of blocks, by all rows of grad and x. Rows pass in chunks that stay in L2 once they are packed.
struct GradTask {
  const tt_block_weight* weight;  // its values are not read
  int64_t row_begin, row_end;
  const char* grad;  // [M, N]
  const char* x;     // [M, K]
  int64_t grad_stride, x_stride;  // bytes
  int64_t M;
  float* sums;  // [blocks, bn, bk], zeros before
};

// kRow of scratch is theirs. False if there is no memory for it.
using GradFn = bool (*)(const GradTask& task);

// Defined in block_linear_grad_<isa>.cpp.
bool block_grad_scalar(const GradTask& task);
bool block_grad_avx2(const GradTask& task);
bool block_grad_avx512(const GradTask& task);

}  // namespace trimtab
