// Adamax (Kingma 2014), as torch.optim.Adamax:
//
//   g = g + weight_decay * p
//   m = m + (1 - beta1) * (g - m);   u = max(beta2 * u, |g| + eps)
//   p = p - lr / (1 - beta1^t) * m / u
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

constexpr int kAdamaxDecay = 1, kAdamaxVariants = 2;

struct AdamaxConstants {
  Lerp first;
  float weight_decay, beta2, eps, minus_step_size;
};

inline int adamax_variant(const tt_optim_group& group, bool) {
  return group.weight_decay != 0.0 ? kAdamaxDecay : 0;
}

TT_INLINE AdamaxConstants adamax_constants(const tt_optim_group& group, const RuleStep& at) {
  return {lerp_constants(1.0 - group.beta1), float(group.weight_decay), float(group.beta2),
          float(group.eps), float(-(group.lr / (1.0 - power(group.beta1, at.step))))};
}

template <int kVariant>
struct Adamax {
  static constexpr int kStates = 2;
  static constexpr unsigned kSigns = 0b1;
  using Constants = AdamaxConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& m = state[0];
    V& u = state[1];
    if (kVariant & kAdamaxDecay) g = decay_into_gradient(g, p, c.weight_decay);
    m = lerp(m, g, c.first);
    const V decayed = u * V(c.beta2);
    const V now = abs(g) + V(c.eps);
    u = select(is_nan(decayed) | (now < decayed), decayed, now);  // a NaN in either stays
    p = add_quotient(p, c.minus_step_size, m, u);
  }
};

}  // namespace
}  // namespace trimtab
