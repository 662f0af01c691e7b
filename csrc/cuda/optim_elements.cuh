// Elements of optim_step on CUDA: from the arrays to floats and back, and what happens to them in between.
#pragma once
#include <initializer_list>
#include <utility>

#include "cuda/float_chunk.cuh"
#include "cuda/optim_table.cuh"
#include "math/adagrad.h"
#include "math/adamax.h"
#include "math/adamw.h"
#include "math/lamb.h"
#include "math/lion.h"
#include "math/nadam.h"
#include "math/radam.h"
#include "math/rmsprop.h"
#include "math/sgd.h"

namespace trimtab {
namespace {

// A rule for the kernel: its struct over the variants, their number, and the most states of any.
template <template <int> class Rule, int kCount, int kMost>
struct RuleFamily {
  template <int kVariant>
  using At = Rule<kVariant>;
  using Constants = typename Rule<0>::Constants;
  static constexpr int kVariants = kCount, kStates = kMost;
  static_assert(sizeof(Constants) <= kThreshold * sizeof(float), "");
};

// --- eight elements of an array, aligned to 16 bytes. The raw bytes of all arrays are asked for before
// any of them is waited for; the dtype is the same for the whole block.

TT_DEVICE RawChunk<float> load_raw(const void* data, int dtype, int64_t at) {
  RawChunk<float> raw;
  const Bytes16* from =
      reinterpret_cast<const Bytes16*>(static_cast<const char*>(data) + at * dtype_bytes(dtype));
  raw.part[0] = load_global(on_global(from));
  raw.part[1] = raw.part[0];
  if (dtype == TT_F32) raw.part[1] = load_global(on_global(from + 1));
  return raw;
}

TT_DEVICE void widen(const RawChunk<float>& raw, int dtype, float (&x)[kEight]) {
  const RawChunk<bf16> as_bf16 = {{raw.part[0]}};
  const RawChunk<fp16> as_fp16 = {{raw.part[0]}};
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    x[j] = dtype == TT_F32    ? element(raw, j)
           : dtype == TT_BF16 ? element(as_bf16, j)
                              : element(as_fp16, j);
}

// Two elements of 16 bits; the conversion of the GPU has another NaN.
TT_DEVICE uint32_t narrow_two(float low, float high, int dtype) {
  const bool nan = low != low || high != high;
  if (dtype == TT_BF16)
    return nan ? uint32_t{to_bf16(low).bits} | uint32_t{to_bf16(high).bits} << 16
               : round_bf16x2(low, high);
  return nan ? uint32_t{to_fp16(low).bits} | uint32_t{to_fp16(high).bits} << 16
             : round_fp16x2(low, high);
}

TT_DEVICE void store_eight(void* data, int dtype, int64_t at, const float (&x)[kEight]) {
  char* to = static_cast<char*>(data) + at * dtype_bytes(dtype);
  if (dtype == TT_F32) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      store16(on_global(to + 16 * i), {float_bits(x[4 * i]), float_bits(x[4 * i + 1]),
                                       float_bits(x[4 * i + 2]), float_bits(x[4 * i + 3])});
  } else {
    store16(on_global(to), {narrow_two(x[0], x[1], dtype), narrow_two(x[2], x[3], dtype),
                            narrow_two(x[4], x[5], dtype), narrow_two(x[6], x[7], dtype)});
  }
}

// --- one element

TT_DEVICE float load_one(const void* data, int dtype, int64_t at) {
  if (dtype == TT_F32) return load_global(on_global(static_cast<const float*>(data) + at));
  const uint16_t bits = load_global(on_global(static_cast<const uint16_t*>(data) + at));
  return dtype == TT_BF16 ? to_float(bf16{bits}) : to_float(fp16{bits});
}

TT_DEVICE void store_one(void* data, int dtype, int64_t at, float x) {
  if (dtype == TT_F32) return store_global(on_global(static_cast<float*>(data) + at), x);
  store_global(on_global(static_cast<uint16_t*>(data) + at),
               dtype == TT_BF16 ? to_bf16(x).bits : to_fp16(x).bits);
}

// x as an array of that dtype holds it.
TT_DEVICE float rounded(int dtype, float x) { return round_to(tt_dtype(dtype), x); }

// --- what happens to kCount elements

template <class Rule, class Constants, int kCount, int kStates>
TT_DEVICE void update_elements(const Constants& c, float (&p)[kCount], const float (&g)[kCount],
                               float (&s)[kStates][kCount]) {
  constexpr int kArrays = Rule::kStates > 0 ? Rule::kStates : 1;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    F32x1 param = p[j], state[kArrays];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) state[k] = s[k][j];
    Rule::update(c, param, F32x1(g[j]), state);
    p[j] = param.v;
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) s[k][j] = state[k].v;
  }
}

template <class Family, int kCount, int... kVariant>
TT_DEVICE void run_rule(int variant, const typename Family::Constants& c, float (&p)[kCount],
                        const float (&g)[kCount], float (&s)[Family::kStates][kCount],
                        std::integer_sequence<int, kVariant...>) {
  // Comparisons that all threads answer alike.
  (void)std::initializer_list<int>{(
      variant == kVariant ? (update_elements<typename Family::template At<kVariant>>(c, p, g, s), 0)
                          : 0)...};
}

// The arguments of an update that all elements of a tensor share.
template <class Constants>
struct TensorFacts {
  Constants constants;
  float scale, clip, threshold, ema_rest;
  bool zero_grad, rounds_clipped;
};

// A gradient unscaled, clipped and with the sign that minimizes.
template <class Constants>
TT_DEVICE float prepared(const OptimRow& row, const TensorFacts<Constants>& f, float g) {
  const F32x1 sign = row.negate ? -1.0f : 1.0f, unscaled = F32x1(g) / F32x1(f.scale);
  if (!f.rounds_clipped) return (unscaled * F32x1(f.clip) * sign).v;
  const F32x1 signed_g = rounded(row.grad_dtype, (unscaled * sign).v);
  return rounded(row.grad_dtype, (signed_g * F32x1(f.clip)).v);
}

template <class Constants>
TT_DEVICE bool prepares(const OptimRow& row, const TensorFacts<Constants>& f) {
  return f.scale != 1.0f || f.clip != 1.0f || row.negate;
}

template <class Family, int kCount>
TT_DEVICE void step_elements(const OptimRow& row, const TensorFacts<typename Family::Constants>& f,
                             int variant, float (&p)[kCount], float (&g)[kCount],
                             float (&s)[Family::kStates][kCount]) {
  if (prepares(row, f)) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) g[j] = prepared(row, f, g[j]);
  }
  run_rule<Family>(variant, f.constants, p, g, s,
                   std::make_integer_sequence<int, Family::kVariants>());
  if (f.threshold > 0.0f) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      p[j] = copysign(max(F32x1(0.0f), abs(F32x1(p[j])) - F32x1(f.threshold)), F32x1(p[j])).v;
  }
}

// Of the parameter as it is stored.
TT_DEVICE float averaged(float ema, float p, float rest) {
  return fma(F32x1(p) - F32x1(ema), F32x1(rest), F32x1(ema)).v;
}

}  // namespace
}  // namespace trimtab
