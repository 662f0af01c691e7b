// What block_linear and its gradients check before anything is written, and the product they share.
#pragma once
#include <trimtab/block_linear.h>

namespace trimtab {

// Sizes, pointers, dtype, and every index that a kernel will follow. values: whether they are read.
tt_status check_block_weight(const char* op, const tt_block_weight* weight, int64_t M, bool values);
tt_status check_block_input(const char* op, const void* x, tt_dtype x_dtype,
                            const tt_block_weight& weight, int64_t M);

// tt_block_linear with arguments that have been checked.
tt_status run_block_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                           const tt_block_weight& weight, int64_t M, const tt_epilogue& epilogue,
                           const tt_parallel* parallel);

}  // namespace trimtab
