// From a rule's number and variant to the loop that was made for it.
#pragma once
#include <utility>

#include "optim_lanes.h"

namespace trimtab {
namespace {

// Loop<Rule>::get() is a Fn, or NULL; bits of kWithout in the variant make no difference to it.
template <class Fn, template <class> class Loop, template <int> class Rule, int kWithout,
          int... kVariant>
Fn pick_loop(int variant, std::integer_sequence<int, kVariant...>) {
  static constexpr Fn table[] = {Loop<Rule<(kVariant & ~kWithout)>>::get()...};
  return table[variant];
}

template <class Fn, template <class> class Loop, template <int> class Rule, int kVariants,
          int kWithout = 0>
Fn pick_loop(int variant) {
  return pick_loop<Fn, Loop, Rule, kWithout>(variant, std::make_integer_sequence<int, kVariants>());
}

// Of loops over whole vectors, which have no tails.
template <class Fn, template <class> class Loop>
Fn pick_whole(tt_rule rule, int variant) {
  switch (rule) {
    case TT_SGD: return pick_loop<Fn, Loop, Sgd, kSgdVariants>(variant);
    case TT_ADAM: return pick_loop<Fn, Loop, Adam, kAdamVariants, kAdamTail>(variant);
    case TT_ADAGRAD: return pick_loop<Fn, Loop, Adagrad, kAdagradVariants, kAdagradTail>(variant);
    case TT_RMSPROP: return pick_loop<Fn, Loop, Rmsprop, kRmspropVariants>(variant);
    case TT_NADAM: return pick_loop<Fn, Loop, Nadam, kNadamVariants>(variant);
    case TT_RADAM: return pick_loop<Fn, Loop, Radam, kRadamVariants>(variant);
    case TT_ADAMAX: return pick_loop<Fn, Loop, Adamax, kAdamaxVariants>(variant);
    case TT_LION: return pick_loop<Fn, Loop, Lion, kLionVariants>(variant);
    case TT_LAMB: return pick_loop<Fn, Loop, Lamb, kLambVariants, kLambProbe>(variant);
    default: return nullptr;
  }
}

}  // namespace
}  // namespace trimtab
