// The loops of optim_step, one row an instruction set. A rule's loop takes parameter, gradient and states of
// one dtype straight from memory; where they differ, or something is folded in before or after the rule, the
// elements pass through blocks of kOptimBlock floats in L1.
#pragma once
#include <trimtab/optim_step.h>

namespace trimtab {

constexpr int64_t kOptimBlock = 512;  // elements converted at once: 5 arrays of 2 KiB
constexpr int64_t kOptimNormBlock = 4096;  // elements of one partial sum of the norm
constexpr int kOptimConstants = 16;  // floats; room for the constants of any rule

// p, g [n];  state: the rule's arrays of n, in the order of tt_rule's comment; all of one dtype
using OptimUpdateFn = void (*)(const void* constants, void* p, const void* g, void* const* state,
                               int64_t n);

struct OptimKernels {
  OptimUpdateFn (*update)(tt_rule rule, int variant, tt_dtype dtype);
  void (*widen)(const void* from, tt_dtype dtype, float* to, int64_t n);
  void (*narrow)(const float* from, void* to, tt_dtype dtype, int64_t n);
  // to = from / scale * clip * sign; from may be to
  void (*prepare)(const float* from, float scale, float clip, float sign, float* to, int64_t n);
  void (*shrink)(float* p, float threshold, int64_t n);
  void (*apply_mask)(float* x, const uint8_t* mask, int64_t n);
  void (*average)(float* ema, const float* p, float rest, int64_t n);
  // Of n <= kOptimNormBlock floats, in an order that depends on nothing but n.
  double (*sum_squares)(const float* x, int64_t n);
};

OptimKernels optim_kernels_scalar();
OptimKernels optim_kernels_avx2();
OptimKernels optim_kernels_avx512();

}  // namespace trimtab
