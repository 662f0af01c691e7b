// NAdam (Dozat 2016), as torch.optim.NAdam:
//
//   p = p * (1 - lr * weight_decay)      decoupled;   else  g = g + weight_decay * p
//   mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2);   product = mu(1) * ... * mu(t)
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + (1 - beta2) * g^2
//   d = sqrt(v) / sqrt(1 - beta2^t) + eps
//   p = p - lr * (1 - mu(t)) / (1 - product) * g / d
//   p = p - lr * mu(t + 1) / (1 - product * mu(t + 1)) * m / d
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

constexpr int kNadamDecay = 1, kNadamVariants = 2;

struct NadamConstants {
  Lerp first;
  float factor, weight_decay, beta2, rest2, correction2_sqrt, eps, gradient_step, moment_step;
  float inverse;  // of correction2_sqrt
};

inline int nadam_variant(const tt_optim_group& group, bool) {
  return decays_into_gradient(group) ? kNadamDecay : 0;
}

// The product is an fp32 tensor in torch, so it rounds every step.
TT_INLINE NadamConstants nadam_constants(const tt_optim_group& group, const RuleStep& at) {
  const auto mu = [&](double t) {
    return group.beta1 * (1.0 - 0.5 * power_of_096(t * group.momentum_decay));
  };
  const double now = mu(at.step), next = mu(at.step + 1.0);
  const float correction2_sqrt = float(::sqrt(1.0 - power(group.beta2, at.step)));
  const double so_far = *at.product = *at.product * float(now);
  return {lerp_constants(1.0 - group.beta1),
          decoupled_factor(group),
          float(group.weight_decay),
          float(group.beta2),
          float(1.0 - group.beta2),
          correction2_sqrt,
          float(group.eps),
          float(-(group.lr * (1.0 - now) / (1.0 - so_far))),
          float(-(group.lr * next / (1.0 - so_far * next))),
          1.0f / correction2_sqrt};
}

template <int kVariant>
struct Nadam {
  static constexpr int kStates = 2;
  static constexpr unsigned kSigns = 0b1;
  using Constants = NadamConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& m = state[0];
    V& v = state[1];
    if (kVariant & kNadamDecay) {
      g = decay_into_gradient(g, p, c.weight_decay);
    } else {
      p = p * V(c.factor);
    }
    m = lerp(m, g, c.first);
    v = average_square(v, g, c.beta2, c.rest2);
    const V d = divide_root(sqrt(v), c.correction2_sqrt, c.inverse) + V(c.eps);
    p = add_quotient(p, c.gradient_step, g, d);
    p = add_quotient(p, c.moment_step, m, d);
  }
};

}  // namespace
}  // namespace trimtab
