// SGD with momentum, dampening and Nesterov's look-ahead, as torch.optim.SGD:
//
//   g = g + weight_decay * p
//   b = g                                   the first time
//   b = momentum * b + (1 - dampening) * g  from then on
//   p = p - lr * (b, or g + momentum * b with Nesterov, or g without momentum)
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

constexpr int kSgdDecay = 1, kSgdMomentum = 2, kSgdNesterov = 4, kSgdFresh = 8, kSgdVariants = 16;

struct SgdConstants {
  float minus_lr, weight_decay, momentum, rest;
};

inline int sgd_variant(const tt_optim_group& group, bool fresh) {
  int variant = group.weight_decay != 0.0 ? kSgdDecay : 0;
  if (group.momentum == 0.0) return variant;
  variant |= kSgdMomentum | (fresh ? kSgdFresh : 0);
  return variant | (group.flags & TT_NESTEROV ? kSgdNesterov : 0);
}

TT_INLINE SgdConstants sgd_constants(const tt_optim_group& group, const RuleStep&) {
  return {float(-group.lr), float(group.weight_decay), float(group.momentum),
          float(1.0 - group.dampening)};
}

template <int kVariant>
struct Sgd {
  static constexpr int kStates = kVariant & kSgdMomentum ? 1 : 0;
  static constexpr unsigned kSigns = 0b1;
  using Constants = SgdConstants;

  template <class V>
  static TT_INLINE void update(const Constants& c, V& p, V g, V* state) {
    if (kVariant & kSgdDecay) g = decay_into_gradient(g, p, c.weight_decay);
    if (kVariant & kSgdMomentum) {
      V& b = state[0];
      b = kVariant & kSgdFresh ? g : fma(g, V(c.rest), b * V(c.momentum));
      g = kVariant & kSgdNesterov ? fma(b, V(c.momentum), g) : b;
    }
    p = fma(g, V(c.minus_lr), p);
  }
};

}  // namespace
}  // namespace trimtab
