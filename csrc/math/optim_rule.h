// What the update rules of the optimizers share. A rule is one header:
//
//   template <int kVariant> struct Rule {
//     static constexpr int kStates;   arrays of state it reads and writes
//     static constexpr unsigned kSigns;   bit k: state k can be negative
//     template <class V> static void update(const <Rule>Constants& c, V& p, V g, V* state);
//   };
//   <rule>_variant(group, tensor's fresh)      which kVariant: the flags that change the formula's shape
//   <rule>_constants(group, at)                everything that is the same for all elements of a tensor
//
// update() is the whole formula for one vector of elements; the CPU vector loop, its tail and the CUDA
// thread call it with their V. Constants are computed once a tensor, on the host, in double, and cast to
// fp32 once (NUMERICS.md section 6); on CUDA by one thread a tensor, with the same bits. g comes in unscaled, clipped and with the sign that minimizes.
#pragma once
#include "../include/trimtab/optim_step.h"
#include "f32x1.h"
#include "power.h"

namespace trimtab {

// Where a tensor stands.
struct RuleStep {
  double step;  // the number of this step, from 1
  float* product;  // NAdam's mu_product: in, of the steps before; out, with this one
  tt_dtype dtype;  // of the parameter
};

namespace {

TT_INLINE float round_to(tt_dtype dtype, float x) {
  if (dtype == TT_BF16) return to_float(to_bf16(x));
  return dtype == TT_F16 ? to_float(to_fp16(x)) : x;
}

// The end + (w - 1)(end - start) of w >= 1/2 loses nothing where start is tiny beside end; torch's lerp.
struct Lerp {
  float coefficient;  // w or w - 1
  float from_end;  // 1 if w >= 1/2
};
TT_INLINE Lerp lerp_constants(double weight) {
  const float w = float(weight);
  return w < 0.5f ? Lerp{w, 0.0f} : Lerp{w - 1.0f, 1.0f};
}
template <class V>
TT_INLINE V lerp(V start, V end, const Lerp& c) {
  const V base = select(V(c.from_end) == V(1.0f), end, start);
  return fma(end - start, V(c.coefficient), base);
}

// L2 decay: g + weight_decay * p.
template <class V>
TT_INLINE V decay_into_gradient(V g, V p, float weight_decay) {
  return fma(p, V(weight_decay), g);
}

// p + value * numerator / denominator, the product first: torch's addcdiv.
template <class V>
TT_INLINE V add_quotient(V p, float value, V numerator, V denominator) {
  return p + (V(value) * numerator) / denominator;
}

// x / c, bit for bit, where x is a square root of a float, or NaN, and 2^-27 <= c <= 1.
// Vectors multiply by the rounded inverse, since the divider is what they wait for. Why that is exact (Markstein 1990), with x and c in
// [1, 2), d = inverse - 1/c, |d| <= 2^-25, and u = ulp(x/c), 2^-23 or, for x < c, 2^-24:
//
//   q = round(x * inverse) is off by less than 3/2 u; r = x - q c is exact, since nothing underflows
//   q + r * inverse = x/c + r d is rounded as x/c unless a midpoint lies between the two. x/c is no midpoint, and
//   at least u 2^-24 / c away from one. |x d| < u, so that q is next to the midpoint nearest to x/c, or that
//   is farther away than |r d| can be; but then |r| is about c u / 2 and |r d| < u 2^-24 / c for c^2 < 4
//
// (c = 2 - 2^-23, where that bound is too weak, was tried with all x.) Inf - Inf is NaN, which max() takes back:
// x <= x / c.
template <class V>
TT_INLINE V divide_root(V x, float c, float inverse) {
  if constexpr (V::lanes == 1) return x / V(c);
  const V q = x * V(inverse);
  return max(fma(fma(q, V(-c), x), V(inverse), q), x);
}

// v * beta + (1 - beta) * g * g as torch's mul_ and addcmul_ round it.
template <class V>
TT_INLINE V average_square(V v, V g, float beta, float rest) {
  return fma(V(rest) * g, g, v * V(beta));
}

// The factor of decoupled weight decay; 1 where there is none.
TT_INLINE float decoupled_factor(const tt_optim_group& group) {
  return group.flags & TT_DECOUPLED ? float(1.0 - group.lr * group.weight_decay) : 1.0f;
}
TT_INLINE bool decays_into_gradient(const tt_optim_group& group) {
  return group.weight_decay != 0.0 && !(group.flags & TT_DECOUPLED);
}

}  // namespace
}  // namespace trimtab
