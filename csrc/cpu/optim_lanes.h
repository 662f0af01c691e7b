// The loops of optim_kernels.h over a vector type V; each ends in a tail of one partial vector, which
// computes what a full vector would, so that any split of an array gives the same bits.
#pragma once
#include <utility>

#include "../math/adagrad.h"
#include "../math/adamax.h"
#include "../math/adamw.h"
#include "../math/lamb.h"
#include "../math/lion.h"
#include "../math/nadam.h"
#include "../math/radam.h"
#include "../math/rmsprop.h"
#include "../math/sgd.h"
#include "optim_kernels.h"

namespace trimtab {
namespace {

template <class V, class T, class Rule>
void update_rule(const void* constants, void* param_data, const void* grad_data, void* const* state,
                 int64_t n) {
  static_assert(sizeof(typename Rule::Constants) <= kOptimConstants * sizeof(float), "");
  constexpr int kArrays = Rule::kStates > 0 ? Rule::kStates : 1;
  // A copy, whose address no store can have: the loop keeps it in registers.
  const typename Rule::Constants c = *static_cast<const typename Rule::Constants*>(constants);
  T* const p = static_cast<T*>(param_data);
  const T* const g = static_cast<const T*>(grad_data);
  T* s[kArrays] = {};
  for (int k = 0; k < Rule::kStates; ++k) s[k] = static_cast<T*>(state[k]);
  V values[kArrays];
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    V param = V::load(p + i);
    for (int k = 0; k < Rule::kStates; ++k) values[k] = V::load(s[k] + i);
    Rule::update(c, param, V::load(g + i), values);
    param.store(p + i);
    for (int k = 0; k < Rule::kStates; ++k) values[k].store(s[k] + i);
  }
  if (const int rest = int(n - i)) {
    V param = V::load_n(p + i, rest);
    for (int k = 0; k < Rule::kStates; ++k) values[k] = V::load_n(s[k] + i, rest);
    Rule::update(c, param, V::load_n(g + i, rest), values);
    param.store_n(p + i, rest);
    for (int k = 0; k < Rule::kStates; ++k) values[k].store_n(s[k] + i, rest);
  }
}

template <class V, class T, template <int> class Rule, int... kVariant>
OptimUpdateFn pick(int variant, std::integer_sequence<int, kVariant...>) {
  static constexpr OptimUpdateFn table[] = {update_rule<V, T, Rule<kVariant>>...};
  return table[variant];
}

template <class V, class T>
OptimUpdateFn update_of(tt_rule rule, int variant) {
  switch (rule) {
    case TT_SGD: return pick<V, T, Sgd>(variant, std::make_integer_sequence<int, kSgdVariants>());
    case TT_ADAM:
      return pick<V, T, Adam>(variant, std::make_integer_sequence<int, kAdamVariants>());
    case TT_ADAGRAD:
      return pick<V, T, Adagrad>(variant, std::make_integer_sequence<int, kAdagradVariants>());
    case TT_RMSPROP:
      return pick<V, T, Rmsprop>(variant, std::make_integer_sequence<int, kRmspropVariants>());
    case TT_NADAM:
      return pick<V, T, Nadam>(variant, std::make_integer_sequence<int, kNadamVariants>());
    case TT_RADAM:
      return pick<V, T, Radam>(variant, std::make_integer_sequence<int, kRadamVariants>());
    case TT_ADAMAX:
      return pick<V, T, Adamax>(variant, std::make_integer_sequence<int, kAdamaxVariants>());
    case TT_LION:
      return pick<V, T, Lion>(variant, std::make_integer_sequence<int, kLionVariants>());
    case TT_LAMB:
      return pick<V, T, Lamb>(variant, std::make_integer_sequence<int, kLambVariants>());
    default: return nullptr;
  }
}

template <class V>
OptimUpdateFn optim_update(tt_rule rule, int variant, tt_dtype dtype) {
  if (dtype == TT_F32) return update_of<V, float>(rule, variant);
  if (dtype == TT_BF16) return update_of<V, bf16>(rule, variant);
  return update_of<V, fp16>(rule, variant);
}

// body(i, load, store): one vector at i; load(p) and store(p, v) move its valid lanes.
template <class V, class Body>
TT_INLINE void for_vectors(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    body(i, [](const auto* p) { return V::load(p); }, [](auto* p, V v) { v.store(p); });
  }
  if (const int rest = int(n - i)) {
    body(
        i, [rest](const auto* p) { return V::load_n(p, rest); },
        [rest](auto* p, V v) { v.store_n(p, rest); });
  }
}

template <class V, class From, class To>
void convert(const void* from, void* to, int64_t n) {
  const From* in = static_cast<const From*>(from);
  To* out = static_cast<To*>(to);
  for_vectors<V>(n, [=](int64_t i, auto load, auto store) { store(out + i, load(in + i)); });
}

template <class V>
void widen(const void* from, tt_dtype dtype, float* to, int64_t n) {
  if (dtype == TT_F32) return convert<V, float, float>(from, to, n);
  if (dtype == TT_BF16) return convert<V, bf16, float>(from, to, n);
  convert<V, fp16, float>(from, to, n);
}

template <class V>
void narrow(const float* from, void* to, tt_dtype dtype, int64_t n) {
  if (dtype == TT_F32) return convert<V, float, float>(from, to, n);
  if (dtype == TT_BF16) return convert<V, float, bf16>(from, to, n);
  convert<V, float, fp16>(from, to, n);
}

template <class V>
void prepare(const float* from, float scale, float clip, float sign, float* to, int64_t n) {
  if (scale == 1.0f) {  // a division takes longer than all the rest
    return for_vectors<V>(n, [=](int64_t i, auto load, auto store) {
      store(to + i, load(from + i) * V(clip) * V(sign));
    });
  }
  for_vectors<V>(n, [=](int64_t i, auto load, auto store) {
    store(to + i, load(from + i) / V(scale) * V(clip) * V(sign));
  });
}

// sign(p) * max(|p| - threshold, 0); a NaN stays
template <class V>
void shrink(float* p, float threshold, int64_t n) {
  for_vectors<V>(n, [=](int64_t i, auto load, auto store) {
    const V x = load(p + i);
    store(p + i, copysign(max(V(0.0f), abs(x) - V(threshold)), x));
  });
}

template <class V>
void apply_mask(float* x, const uint8_t* mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = mask[i] ? x[i] : 0.0f;
}

template <class V>
void average(float* ema, const float* p, float rest, int64_t n) {
  for_vectors<V>(n, [=](int64_t i, auto load, auto store) {
    const V e = load(ema + i);
    store(ema + i, fma(load(p + i) - e, V(rest), e));
  });
}

// 32 running sums, element i into sum i % 32, whatever the width of V; then those in order, in double.
// A sum of at most 128 squares in fp32 errs by less than 2^-17, on average far less.
template <class V>
double sum_squares(const float* x, int64_t n) {
  constexpr int kSums = 32, kVectors = kSums / V::lanes;
  V sums[kVectors];
  for (int k = 0; k < kVectors; ++k) sums[k] = V(0.0f);
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int k = 0; k < kVectors; ++k) {
      const V v = V::load(x + i + k * V::lanes);
      sums[k] = fma(v, v, sums[k]);
    }
  }
  float lanes[kSums];
  for (int k = 0; k < kVectors; ++k) sums[k].store(lanes + k * V::lanes);
  for (int64_t k = 0; i + k < n; ++k) {
    lanes[k] = fma(F32x1(x[i + k]), F32x1(x[i + k]), F32x1(lanes[k])).v;
  }
  double total = 0.0;
  for (int k = 0; k < kSums; ++k) total += lanes[k];
  if (float_bits(float(total)) < 0x7f800000u) return total;
  total = 0.0;  // a square above 3.4e38, or no number: double holds the first, keeps the second
  for (int64_t k = 0; k < n; ++k) total += double(x[k]) * double(x[k]);
  return total;
}

template <class V>
OptimKernels optim_kernels() {
  return {optim_update<V>, widen<V>,      narrow<V>,  prepare<V>,
          shrink<V>,       apply_mask<V>, average<V>, sum_squares<V>};
}

}  // namespace
}  // namespace trimtab
