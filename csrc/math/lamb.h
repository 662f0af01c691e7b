// LAMB (You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"):
//
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + (1 - beta2) * g^2
//   u = m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p
//   p = p - lr * |p| / |u| * u       norms over the whole tensor; the ratio is 1 where one of them is 0
//
// Without decay the ratio is 1 unless TT_ALWAYS_ADAPT: in the paper's own code biases and the weights of
// norms, which do not decay, do not adapt either.
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

// The probe leaves u in p: its norm is to be known before the first element moves.
constexpr int kLambProbe = 1, kLambVariants = 2;

struct LambConstants {
  Lerp first;
  float weight_decay, beta2, rest2, correction1, correction2_sqrt, eps;
  float lr, adapts;
  float rate;  // lr times the ratio
  float inverse;  // of correction2_sqrt
};

inline int lamb_variant(const tt_optim_group&, bool) { return 0; }

TT_INLINE LambConstants lamb_constants(const tt_optim_group& group, const RuleStep& at) {
  const bool corrected = group.flags & TT_BIAS_CORRECTION;
  const double correction1 = corrected ? 1.0 - power(group.beta1, at.step) : 1.0;
  const double correction2 = corrected ? 1.0 - power(group.beta2, at.step) : 1.0;
  const bool adapts = group.weight_decay != 0.0 || (group.flags & TT_ALWAYS_ADAPT);
  return {lerp_constants(1.0 - group.beta1),
          float(group.weight_decay),
          float(group.beta2),
          float(1.0 - group.beta2),
          float(correction1),
          float(::sqrt(correction2)),
          float(group.eps),
          float(group.lr),
          adapts ? 1.0f : 0.0f,
          float(group.lr),
          1.0f / float(::sqrt(correction2))};
}

TT_INLINE void lamb_adapt(LambConstants& c, double param_norm, double direction_norm) {
  const bool adapts = c.adapts != 0.0f && param_norm > 0.0 && direction_norm > 0.0;
  c.rate = adapts ? float(double(c.lr) * (param_norm / direction_norm)) : c.lr;
}

template <int kVariant>
struct Lamb {
  static constexpr int kStates = 2;
  static constexpr unsigned kSigns = 0b1;
  using Constants = LambConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& m = state[0];
    V& v = state[1];
    m = lerp(m, g, c.first);
    v = average_square(v, g, c.beta2, c.rest2);
    const V denominator = divide_root(sqrt(v), c.correction2_sqrt, c.inverse) + V(c.eps);
    const V u = fma(p, V(c.weight_decay), (m / V(c.correction1)) / denominator);
    p = kVariant & kLambProbe ? u : fma(u, V(-c.rate), p);
  }
};

}  // namespace
}  // namespace trimtab
