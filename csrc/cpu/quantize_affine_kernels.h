// The table of quantize_affine's kernels: one row an instruction set.
#pragma once
#include <trimtab/quantize_affine.h>

namespace trimtab {

// Adjacent groups of one row: n elements, of which the last group may be short.
struct AffineSpan {
  int64_t n, group;
  float levels;  // 2^bits - 1; quantizing only
  uint8_t* q;
  float* scale;
  uint8_t* zero_point;
};

struct AffineKernel {
  void (*quantize)(const void* x, tt_dtype dtype, const AffineSpan& span);
  void (*dequantize)(const AffineSpan& span, void* out, tt_dtype dtype);
};

// Defined in quantize_affine_<isa>.cpp.
extern const AffineKernel kAffineScalar, kAffineAvx2, kAffineAvx512;

}  // namespace trimtab
