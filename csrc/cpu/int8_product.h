// The product behind int8_mm, int8_linear and int8_conv2d: rows come from a source, go into panels,
// meet the packed weight block by block, and leave through the epilogue.
#pragma once
#include "cpu/int8_kernels.h"

namespace trimtab {

// Where activation rows come from: fills one panel (rows <= kernel.mr, starting at row m) and its
// scales. Called from many threads, once a panel.
struct RowSource {
  void (*fill)(const void* self, const Int8Kernel& kernel, int64_t m, int rows, void* panel,
               float* scale);
  const void* self;
};

// Checks what all callers share; `op` names the op in messages, int8_out says that out may be int8.
tt_status check_product(const char* op, int64_t M, int64_t N, int64_t K, const int8_t* b_packed,
                        const tt_epilogue* epilogue, bool int8_out = false);

// Runs it. Arguments have been checked.
tt_status run_product(const char* op, const RowSource& source, const int8_t* b_packed, int64_t M,
                      int64_t N, int64_t K, const tt_epilogue& epilogue,
                      const tt_parallel* parallel);

// The bias as fp32 [N]: a 16-bit one widened, -0.0 where there is none. Not for an fp32 bias.
void widen_bias(const tt_epilogue& epilogue, int64_t N, float* bias);

// Bytes of an element; 0 if dtype is none of our float ones.
int dtype_size(tt_dtype dtype);

}  // namespace trimtab
