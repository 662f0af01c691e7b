// RMSprop (Hinton), centered (Graves 2013), with momentum, as torch.optim.RMSprop:
//
//   g = g + weight_decay * p
//   v = alpha * v + (1 - alpha) * g^2
//   d = sqrt(v) + eps;        centered: a = a + (1 - alpha) * (g - a),  d = sqrt(v - a^2) + eps
//   p = p - lr * g / d;       momentum: b = momentum * b + g / d,       p = p - lr * b
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

constexpr int kRmspropDecay = 1, kRmspropMomentum = 2, kRmspropCentered = 4, kRmspropVariants = 8;

struct RmspropConstants {
  Lerp mean;
  float minus_lr, weight_decay, alpha, rest, momentum, eps;
};

inline int rmsprop_variant(const tt_optim_group& group, bool) {
  return (group.weight_decay != 0.0 ? kRmspropDecay : 0) |
         (group.momentum > 0.0 ? kRmspropMomentum : 0) |
         (group.flags & TT_CENTERED ? kRmspropCentered : 0);
}

TT_INLINE RmspropConstants rmsprop_constants(const tt_optim_group& group, const RuleStep&) {
  return {lerp_constants(1.0 - group.alpha),
          float(-group.lr),
          float(group.weight_decay),
          float(group.alpha),
          float(1.0 - group.alpha),
          float(group.momentum),
          float(group.eps)};
}

template <int kVariant>
struct Rmsprop {
  static constexpr int kMomentum = kVariant & kRmspropMomentum ? 1 : 0;
  static constexpr int kStates = 1 + kMomentum + (kVariant & kRmspropCentered ? 1 : 0);
  static constexpr unsigned kSigns = 0b110;
  using Constants = RmspropConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    V& v = state[0];
    if (kVariant & kRmspropDecay) g = decay_into_gradient(g, p, c.weight_decay);
    v = average_square(v, g, c.alpha, c.rest);
    V centered = v;
    if (kVariant & kRmspropCentered) {
      V& mean = state[1 + kMomentum];
      mean = lerp(mean, g, c.mean);
      centered = fma(-mean, mean, v);
    }
    const V d = sqrt(centered) + V(c.eps);
    if (kVariant & kRmspropMomentum) {
      state[1] = state[1] * V(c.momentum) + g / d;
      p = fma(state[1], V(c.minus_lr), p);
    } else {
      p = add_quotient(p, c.minus_lr, g, d);
    }
  }
};

}  // namespace
}  // namespace trimtab
