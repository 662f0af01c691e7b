// Adagrad (Duchi 2011), bit for bit torch's fused kernel for the CPU:
//
//   g = g + weight_decay * p
//   s = s + g^2
//   p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
#pragma once
#include "optim_rule.h"

namespace trimtab {
namespace {

// The tail: torch's vector loop rounds its scalars to the dtype of the tensors, its loop over the elements
// that fill no vector does not.
constexpr int kAdagradDecay = 1, kAdagradTail = 2, kAdagradVariants = 4;

struct AdagradScalars {
  float minus_lr, weight_decay, eps;
};
struct AdagradConstants {
  AdagradScalars body, tail;
};

inline int adagrad_variant(const tt_optim_group& group, bool) {
  return group.weight_decay != 0.0 ? kAdagradDecay : 0;
}

TT_INLINE AdagradConstants adagrad_constants(const tt_optim_group& group, const RuleStep& at) {
  const double lr = group.lr / (1.0 + (at.step - 1.0) * group.lr_decay);
  const AdagradScalars plain = {float(-lr), float(group.weight_decay), float(group.eps)};
  const AdagradScalars rounded = {round_to(at.dtype, plain.minus_lr),
                                  round_to(at.dtype, plain.weight_decay),
                                  round_to(at.dtype, plain.eps)};
  return {rounded, plain};
}

template <int kVariant>
struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr unsigned kSigns = 0;
  using Constants = AdagradConstants;

  template <class V>
  static TT_INLINE void update(const Constants& constants, V& p, V g, V* state) {
    const AdagradScalars& c = kVariant & kAdagradTail ? constants.tail : constants.body;
    if (kVariant & kAdagradDecay) g = decay_into_gradient(g, p, c.weight_decay);
    state[0] = fma(g, g, state[0]);
    p = add_quotient(p, c.minus_lr, g, sqrt(state[0]) + V(c.eps));
  }
};

}  // namespace
}  // namespace trimtab
