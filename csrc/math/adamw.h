// Adam (Kingma 2014), AMSGrad (Reddi 2018) and AdamW (Loshchilov and Hutter 2017), bit for bit
// torch's fused kernel for the CPU:
//
//   p = p * (1 - lr * weight_decay)      decoupled;   else  g = g + weight_decay * p
//   m = m + (1 - beta1) * (g - m)
//   v = beta2 * v + (1 - beta2) * g^2;   AMSGrad: x = max(x, v) stands for v below
//   p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

// The tail: torch's kernel takes 32 bytes at a time and leaves the rest of a tensor to a loop that the
// compiler contracts otherwise, v = fma(v, beta2, (1 - beta2) g g). One ulp in every fourth element.
constexpr int kAdamDecay = 1, kAdamAmsgrad = 2, kAdamTail = 4, kAdamVariants = 8;

struct AdamConstants {
  Lerp first;
  float factor, weight_decay, beta2, rest2, minus_step_size, correction2_sqrt, eps;
  float inverse;  // of correction2_sqrt
};

inline int adam_variant(const tt_optim_group& group, bool) {
  return (decays_into_gradient(group) ? kAdamDecay : 0) |
         (group.flags & TT_AMSGRAD ? kAdamAmsgrad : 0);
}

TT_INLINE AdamConstants adam_constants(const tt_optim_group& group, const RuleStep& at) {
  const double correction1 = 1.0 - power(group.beta1, at.step);
  const double correction2 = 1.0 - power(group.beta2, at.step);
  return {lerp_constants(1.0 - group.beta1), decoupled_factor(group),
          float(group.weight_decay),         float(group.beta2),
          float(1.0 - group.beta2),          float(-(group.lr / correction1)),
          float(::sqrt(correction2)),        float(group.eps),
          1.0f / float(::sqrt(correction2))};
}

template <int kVariant>
struct Adam {
  static constexpr int kStates = kVariant & kAdamAmsgrad ? 3 : 2;
  static constexpr unsigned kSigns = 0b1;
  using Constants = AdamConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& m = state[0];
    V& v = state[1];
    if (kVariant & kAdamDecay) {
      g = decay_into_gradient(g, p, c.weight_decay);
    } else {
      p = p * V(c.factor);
    }
    m = lerp(m, g, c.first);
    v = kVariant & kAdamTail ? fma(v, V(c.beta2), V(c.rest2) * g * g)
                             : average_square(v, g, c.beta2, c.rest2);
    V largest = v;
    if (kVariant & kAdamAmsgrad) {
      // A NaN in either stays: torch's maximum.
      V& x = state[2];
      x = select(is_nan(x) | (v < x), x, v);
      largest = x;
    }
    p = add_quotient(p, c.minus_step_size, m,
                     divide_root(sqrt(largest), c.correction2_sqrt, c.inverse) + V(c.eps));
  }
};

}  // namespace
}  // namespace trimtab
