// Lion (Chen 2023, "Symbolic Discovery of Optimization Algorithms"):
//
//   p = p * (1 - lr * weight_decay)
//   u = beta1 * m + (1 - beta1) * g;   p = p - lr * sign(u)      sign(0) = 0
//   m = beta2 * m + (1 - beta2) * g
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

constexpr int kLionVariants = 1;

struct LionConstants {
  Lerp look, keep;
  float factor, lr;
};

inline int lion_variant(const tt_optim_group&, bool) { return 0; }

TT_INLINE LionConstants lion_constants(const tt_optim_group& group, const RuleStep&) {
  return {lerp_constants(1.0 - group.beta1), lerp_constants(1.0 - group.beta2),
          float(1.0 - group.lr * group.weight_decay), float(group.lr)};
}

template <int kVariant>
struct Lion {
  static constexpr int kStates = 1;
  static constexpr unsigned kSigns = 0b1;
  using Constants = LionConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& m = state[0];
    const V u = lerp(m, g, c.look);
    const V move = select(u == V(0.0f), V(0.0f), copysign(V(c.lr), u));
    p = p * V(c.factor) - select(is_nan(u), u, move);
    m = lerp(m, g, c.keep);
  }
};

}  // namespace
}  // namespace trimtab
