// How optim_step's smaller formats come to floats and back: 8-bit states, stochastic rounding, masters.
// All arrays of floats have room for kOptimBlock, which whole vectors may write.
#pragma once
#include <trimtab/optim_step.h>

#include "cpu/optim_kernels.h"
#include "math/dynamic_code.h"
#include "math/stochastic_rounding.h"

namespace trimtab {

// kDynamicBlock elements with 8-bit states on their way through a rule.
struct OptimCodedBlock {
  float* p;
  const float* g;
  const char *p_ahead, *g_ahead;  // memory to ask for meanwhile, as many bytes
  uint8_t* codes[TT_OPTIM_STATES];
  float* scales[TT_OPTIM_STATES];  // one each
  float (*floats)[kDynamicBlock];  // the states between update and encoding
  const RandomKey*
      keys;  // of the states, for the 2^32 elements around these; NULL rounds to nearest
  uint32_t element;  // number of the first of them, mod 2^32
};
// Updates one block, and meanwhile encodes another, which has been updated; either may be NULL.
using OptimCodedFn = void (*)(const void* constants, const OptimCodedBlock* updated,
                              const OptimCodedBlock* encoded);

// n elements of bf16 parameters, gradients and states, n a multiple of kMasterLanes.
struct OptimHalves {
  bf16* p;
  uint16_t* master;
  const bf16* g;
  bf16* states[TT_OPTIM_STATES];
  int64_t n;
  float factor;  // of the gradient
  // Without a master all round stochastically, with these keys: number 0 is the parameter's, 1 + k state k's.
  RandomKey keys[1 + TT_OPTIM_STATES];
  uint32_t element;  // number of the first of them, mod 2^32
};
using OptimHalvesFn = void (*)(const void* constants, const OptimHalves& arrays);
constexpr int kMasterLanes = 16;

struct OptimMemoryKernels {
  // codes [n], one scale for each kDynamicBlock of them
  void (*decode)(const uint8_t* codes, const float* scale, bool is_signed, float* to, int64_t n);
  // key: NULL rounds to nearest; element: number of the first in its tensor. Pads `from` with zeros.
  void (*encode)(float* from, bool is_signed, const RandomKey* key, int64_t element, uint8_t* codes,
                 float* scale, int64_t n);
  void (*narrow_stochastic)(const float* from, RandomKey key, int64_t element, bf16* to, int64_t n);
  // master: remainders (int16) or compensations (bf16)
  void (*open_remainder)(const bf16* param, const uint16_t* master, float* to, int64_t n);
  void (*close_remainder)(const float* from, bf16* param, uint16_t* master, int64_t n);
  void (*open_kahan)(const bf16* param, const uint16_t* master, float* to, int64_t n);
  void (*close_kahan)(const float* from, bf16* param, uint16_t* master, int64_t n);
  // NULL, or NULL for a rule: decode, update and encode by blocks of kOptimBlock, which give the same bits.
  OptimCodedFn (*coded)(tt_rule rule, int variant, bool stochastic);
  OptimHalvesFn (*halves)(tt_rule rule, int variant, int master);  // likewise; a tt_master
};

OptimMemoryKernels optim_memory_scalar();
OptimMemoryKernels optim_memory_avx2();
OptimMemoryKernels optim_memory_avx512();
tt_status optim_memory_kernels(OptimMemoryKernels* out);  // for the current instruction set

}  // namespace trimtab
