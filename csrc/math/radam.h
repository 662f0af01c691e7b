// RAdam (Liu 2019), as torch.optim.RAdam:
//
//   p = p * (1 - lr * weight_decay)      decoupled;   else  g = g + weight_decay * p
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + (1 - beta2) * g^2
//   rho = rho_inf - 2 t beta2^t / (1 - beta2^t),   rho_inf = 2 / (1 - beta2) - 1
//   r = sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho))
//   p = p - lr / (1 - beta1^t) * m * (r * sqrt(1 - beta2^t) / (sqrt(v) + eps)   if rho > 5, else 1)
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

constexpr int kRadamDecay = 1, kRadamVariants = 2;

struct RadamConstants {
  Lerp first;
  float factor, weight_decay, beta2, rest2, eps;
  float rectified, plain;  // one of the two is 0
};

inline int radam_variant(const tt_optim_group& group, bool) {
  return decays_into_gradient(group) ? kRadamDecay : 0;
}

TT_INLINE RadamConstants radam_constants(const tt_optim_group& group, const RuleStep& at) {
  const double power2 = power(group.beta2, at.step);
  const double limit = 2.0 / (1.0 - group.beta2) - 1.0;
  const double rho = limit - 2.0 * at.step * power2 / (1.0 - power2);
  const double correction1 = 1.0 - power(group.beta1, at.step);
  double rectified = 0.0;
  if (rho > 5.0) {
    rectified = ::sqrt((rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho));
  }
  const double plain = rectified > 0.0 ? 0.0 : 1.0;
  return {lerp_constants(1.0 - group.beta1),
          decoupled_factor(group),
          float(group.weight_decay),
          float(group.beta2),
          float(1.0 - group.beta2),
          float(group.eps),
          float(-(::sqrt(1.0 - power2) * (group.lr * rectified / correction1))),
          float(-(group.lr * plain / correction1))};
}

template <int kVariant>
struct Radam {
  static constexpr int kStates = 2;
  static constexpr unsigned kSigns = 0b1;
  using Constants = RadamConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& m = state[0];
    V& v = state[1];
    if (kVariant & kRadamDecay) {
      g = decay_into_gradient(g, p, c.weight_decay);
    } else {
      p = p * V(c.factor);
    }
    m = lerp(m, g, c.first);
    v = average_square(v, g, c.beta2, c.rest2);
    // As torch's foreach kernel rounds it: while rectified is 0 the quotient is Inf and its inverse 0.
    const V inverse = V(1.0f) / ((sqrt(v) + V(c.eps)) / V(c.rectified));
    p = fma(m, inverse + V(c.plain), p);
  }
};

}  // namespace
}  // namespace trimtab
