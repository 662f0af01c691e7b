// The update of optim_step on CUDA: a block takes a piece of one tensor, tile by tile of 1024 elements. In a
// whole tile of an aligned tensor a thread takes eight adjacent elements, by 16 bytes; in others eight
// elements kUpdateThreads apart, one by one. Both do with an element what csrc/cpu does.
#pragma once
#include <initializer_list>
#include <utility>

#include "cuda/float_chunk.cuh"
#include "cuda/optim_table.cuh"
#include "math/adagrad.h"
#include "math/adamax.h"
#include "math/adamw.h"
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
  raw.part[0] = load_global(from);
  raw.part[1] = raw.part[0];
  if (dtype == TT_F32) raw.part[1] = load_global(from + 1);
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
      store16(to + 16 * i, {float_bits(x[4 * i]), float_bits(x[4 * i + 1]),
                            float_bits(x[4 * i + 2]), float_bits(x[4 * i + 3])});
  } else {
    store16(to, {narrow_two(x[0], x[1], dtype), narrow_two(x[2], x[3], dtype),
                 narrow_two(x[4], x[5], dtype), narrow_two(x[6], x[7], dtype)});
  }
}

// --- one element

TT_DEVICE float load_one(const void* data, int dtype, int64_t at) {
  if (dtype == TT_F32) return load_global(static_cast<const float*>(data) + at);
  const uint16_t bits = load_global(static_cast<const uint16_t*>(data) + at);
  return dtype == TT_BF16 ? to_float(bf16{bits}) : to_float(fp16{bits});
}

TT_DEVICE void store_one(void* data, int dtype, int64_t at, float x) {
  if (dtype == TT_F32) return store_global(static_cast<float*>(data) + at, x);
  store_global(static_cast<uint16_t*>(data) + at,
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
  bool zero_grad;
};

template <class Family, int kCount>
TT_DEVICE void step_elements(const OptimRow& row, const TensorFacts<typename Family::Constants>& f,
                             int variant, float (&p)[kCount], float (&g)[kCount],
                             float (&s)[Family::kStates][kCount]) {
  if (f.scale != 1.0f || f.clip != 1.0f || row.negate) {
    const F32x1 sign = row.negate ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) g[j] = (F32x1(g[j]) / F32x1(f.scale) * F32x1(f.clip) * sign).v;
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

// Eight adjacent elements, all there, all aligned.
template <class Family>
TT_DEVICE void step_eight(const OptimRow& row, const TensorFacts<typename Family::Constants>& f,
                          int64_t at) {
  RawChunk<float> raw_p = load_raw(row.param, row.param_dtype, at);
  RawChunk<float> raw_g = load_raw(row.grad, row.grad_dtype, at);
  RawChunk<float> raw_s[Family::kStates];
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    raw_s[k] = {};
    if (k < row.states) raw_s[k] = load_raw(row.state[k], row.state_dtype, at);
  }
  float p[kEight], g[kEight], s[Family::kStates][kEight];
  widen(raw_p, row.param_dtype, p);
  widen(raw_g, row.grad_dtype, g);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) widen(raw_s[k], row.state_dtype, s[k]);
  step_elements<Family>(row, f, row.variant, p, g, s);
  if (row.mask != nullptr) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const bool keep = load_global(row.mask + at + j) != 0;
      p[j] = keep ? p[j] : 0.0f;
#pragma unroll
      for (int k = 0; k < Family::kStates; ++k) s[k][j] = keep ? s[k][j] : 0.0f;
    }
  }
  store_eight(row.param, row.param_dtype, at, p);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < row.states) store_eight(row.state[k], row.state_dtype, at, s[k]);
  if (row.copy != nullptr) store_eight(row.copy, row.copy_dtype, at, p);
  if (row.ema != nullptr) {
    float e[kEight];
    widen(load_raw(row.ema, TT_F32, at), TT_F32, e);
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      e[j] = averaged(e[j], rounded(row.param_dtype, p[j]), f.ema_rest);
    store_eight(row.ema, TT_F32, at, e);
  }
  if (f.zero_grad) {
    const float zero[kEight] = {};
    store_eight(row.grad, row.grad_dtype, at, zero);
  }
}

template <class Family>
TT_DEVICE void step_one(const OptimRow& row, const TensorFacts<typename Family::Constants>& f,
                        int64_t at) {
  float p[1] = {load_one(row.param, row.param_dtype, at)};
  float g[1] = {load_one(row.grad, row.grad_dtype, at)};
  float s[Family::kStates][1];
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    s[k][0] = 0.0f;
    if (k < row.states) s[k][0] = load_one(row.state[k], row.state_dtype, at);
  }
  step_elements<Family>(row, f, at < row.body ? row.variant : row.tail, p, g, s);
  const bool keep = row.mask == nullptr || load_global(row.mask + at) != 0;
  p[0] = keep ? p[0] : 0.0f;
  store_one(row.param, row.param_dtype, at, p[0]);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < row.states) store_one(row.state[k], row.state_dtype, at, keep ? s[k][0] : 0.0f);
  if (row.copy != nullptr) store_one(row.copy, row.copy_dtype, at, p[0]);
  if (row.ema != nullptr)
    store_global(row.ema + at,
                 averaged(load_global(row.ema + at), rounded(row.param_dtype, p[0]), f.ema_rest));
  if (f.zero_grad) store_one(row.grad, row.grad_dtype, at, 0.0f);
}

// A skipped step: the gradients alone.
TT_DEVICE void zero_gradient(const OptimRow& row, int64_t begin, int64_t end) {
  for (int64_t at = begin + threadIdx.x; at < end; at += kUpdateThreads)
    store_one(row.grad, row.grad_dtype, at, 0.0f);
}

template <class Family>
__global__ void __launch_bounds__(kUpdateThreads, 4)
    optim_update(const __grid_constant__ OptimParams params) {
  const OptimPiece piece = load_global(params.table.pieces + blockIdx.x);
  const OptimRow row = load_global(params.table.rows + piece.row);
  const OptimFacts facts = load_global(params.facts);
  const int64_t first = int64_t{piece.at} * kTile - row.shift;
  const int64_t last = ::min(first + int64_t{params.tiles} * kTile, row.numel);
  if (facts.skip) {
    if (params.zero_grad) zero_gradient(row, ::max(first, int64_t{0}), last);
    return;
  }
  using Constants = typename Family::Constants;
  const float* constants = params.constants + int64_t{piece.row} * kConstantFloats;
  const TensorFacts<Constants> f = {load_global(reinterpret_cast<const Constants*>(constants)),
                                    facts.scale,
                                    facts.clip,
                                    load_global(constants + kThreshold),
                                    params.ema_rest,
                                    params.zero_grad != 0};
#pragma unroll 1
  for (int64_t tile = first; tile < last; tile += kTile) {
    if (row.wide && tile >= 0 && tile + kTile <= row.body) {
      step_eight<Family>(row, f, tile + int64_t{threadIdx.x} * kEight);
      continue;
    }
#pragma unroll 1
    for (int64_t at = tile + threadIdx.x; at < ::min(tile + kTile, last); at += kUpdateThreads)
      if (at >= 0) step_one<Family>(row, f, at);
  }
}

}  // namespace
}  // namespace trimtab
