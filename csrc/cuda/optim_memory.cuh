// optim_step's smaller formats on CUDA: 8-bit states, stochastic rounding, masters beside bf16 parameters.
// A warp takes a block of kDynamicBlock elements, eight a thread, so that their scale is a maximum over the
// warp. Formulas: csrc/math/{dynamic_code,stochastic_rounding,master}.h; csrc/cpu/optim_window.h does the same.
#pragma once
#include "cuda/optim_table.cuh"
#include "math/master.h"
#include "math/optim_rule.h"

namespace trimtab {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
static_assert(kDynamicBlock == 32 * kEight, "a block is a warp's");

// Bytes of shared memory: the tables, then the new values of 8-bit states that wait for their scale.
constexpr int kCompactTables = (2 * int(sizeof(DynamicCode)) + 15) / 16 * 16;
constexpr int compact_shared(int states) {
  return kCompactTables + states * kEight * kUpdateThreads * int(sizeof(float));
}

TT_DEVICE void load_dynamic_tables(const DynamicCode* from) {
  constexpr int kWords = 2 * sizeof(DynamicCode) / sizeof(float);
  float* to = reinterpret_cast<float*>(shared_memory());
  const float* words = reinterpret_cast<const float*>(from);
  for (int i = threadIdx.x; i < kWords; i += kUpdateThreads)
    to[i] = load_global(on_global(words + i));
  __syncthreads();
}

// How an array is rounded.
struct Rounding {
  bool random;
  RandomKey key;
};

TT_DEVICE U32x1 random_word(const Rounding& rounding, int64_t at) {
  return random_bits(key_around(rounding.key, at), U32x1(uint32_t(at)));
}

// --- bf16

TT_DEVICE uint16_t to_bf16_bits(float x, const Rounding& rounding, int64_t at) {
  if (rounding.random) return uint16_t(stochastic_bf16(F32x1(x), random_word(rounding, at)).v);
  return to_bf16(x).bits;
}

// --- masters

TT_DEVICE float open_master(int kind, uint32_t param, uint32_t master) {
  if (kind == TT_MASTER_REMAINDER) return join_remainder<F32x1>(U32x1(param), U32x1(master)).v;
  return (F32x1(to_float(bf16{uint16_t(param)})) + F32x1(to_float(bf16{uint16_t(master)}))).v;
}

TT_DEVICE void close_master(int kind, float x, uint32_t* param, uint32_t* master) {
  if (kind == TT_MASTER_REMAINDER) {
    U32x1 upper, lower;
    split_remainder(F32x1(x), &upper, &lower);
    *param = upper.v, *master = lower.v;
    return;
  }
  const bf16 rounded = to_bf16(x);
  *param = rounded.bits;
  *master = to_bf16(lost(F32x1(x), F32x1(to_float(rounded))).v).bits;
}

// --- 8-bit codes

TT_DEVICE float decoded(bool is_signed, uint32_t code, float scale) {
  const F32x1 x = U32x1(code).to_floats();
  const F32x1 value = is_signed ? dynamic_value<true>(x) : dynamic_value<false>(x);
  return (value * F32x1(scale)).v;
}

template <bool kSigned>
TT_DEVICE uint32_t code_of(float x, float inverse, const Rounding& rounding, int64_t at) {
  const F32x1 step = rounding.random
                         ? dynamic_stochastic<kSigned>(F32x1(x), F32x1(inverse),
                                                       uniform<F32x1>(random_word(rounding, at)))
                         : dynamic_nearest<kSigned>(F32x1(x), F32x1(inverse));
  const int32_t code = to_int32_rne(step) + kDynamicBias<kSigned>;
  return code < 0 ? 0u : uint32_t(code);
}

TT_DEVICE uint32_t encoded(bool is_signed, float x, float inverse, const Rounding& rounding,
                           int64_t at) {
  return is_signed ? code_of<true>(x, inverse, rounding, at)
                   : code_of<false>(x, inverse, rounding, at);
}

// The scale of the warp's block, of each lane's largest |x|: the bits order as the values do, with Inf and NaN
// on top.
TT_DEVICE float block_scale(uint32_t largest) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, lanes);
    largest = other > largest ? other : largest;
  }
  return float_from_bits(largest < 0x7f800000u ? largest : 0x7fc00000u);
}

// A scale below 2^-128 has no finite inverse; then codes come out too small, of numbers below 3e-39.
TT_DEVICE float inverse_scale(float scale) {
  if (!(scale > 0.0f)) return 0.0f;
  const float inverse = (F32x1(1.0f) / F32x1(scale)).v;
  return inverse < 3.4028234e38f ? inverse : 3.4028234e38f;
}

TT_DEVICE uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

}  // namespace
}  // namespace trimtab
