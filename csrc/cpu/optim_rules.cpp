#include "cpu/optim_rules.h"

#include <utility>

#include "math/adagrad.h"
#include "math/adamax.h"
#include "math/adamw.h"
#include "math/lamb.h"
#include "math/lion.h"
#include "math/nadam.h"
#include "math/radam.h"
#include "math/rmsprop.h"
#include "math/sgd.h"

namespace trimtab {
namespace {

template <class Constants, Constants (*make)(const tt_optim_group&, const RuleStep&)>
void store_constants(const tt_optim_group& group, const RuleStep& at, float* out) {
  static_assert(sizeof(Constants) <= kOptimConstants * sizeof(float), "");
  const Constants constants = make(group, at);
  std::memcpy(out, &constants, sizeof constants);
}

template <template <int> class Rule, int... kVariant>
int states_of(int variant, std::integer_sequence<int, kVariant...>) {
  static constexpr int states[] = {Rule<kVariant>::kStates...};
  return states[variant];
}

template <template <int> class Rule, int kVariants>
int states(int variant) {
  return states_of<Rule>(variant, std::make_integer_sequence<int, kVariants>());
}

template <class Constants, void (*adapt)(Constants&, double, double)>
void adapt_constants(float* stored, double param_norm, double direction_norm) {
  Constants constants;
  std::memcpy(&constants, stored, sizeof constants);
  adapt(constants, param_norm, direction_norm);
  std::memcpy(stored, &constants, sizeof constants);
}

// In the order of tt_rule.
constexpr OptimRule kRules[] = {
    {"SGD", false, false, sgd_variant, states<Sgd, kSgdVariants>, Sgd<0>::kSigns, 0,
     store_constants<SgdConstants, sgd_constants>, 0, nullptr},
    {"Adam", true, false, adam_variant, states<Adam, kAdamVariants>, Adam<0>::kSigns, kAdamTail,
     store_constants<AdamConstants, adam_constants>, 0, nullptr},
    {"Adagrad", true, false, adagrad_variant, states<Adagrad, kAdagradVariants>, Adagrad<0>::kSigns,
     kAdagradTail, store_constants<AdagradConstants, adagrad_constants>, 0, nullptr},
    {"RMSprop", true, false, rmsprop_variant, states<Rmsprop, kRmspropVariants>, Rmsprop<0>::kSigns,
     0, store_constants<RmspropConstants, rmsprop_constants>, 0, nullptr},
    {"NAdam", true, true, nadam_variant, states<Nadam, kNadamVariants>, Nadam<0>::kSigns, 0,
     store_constants<NadamConstants, nadam_constants>, 0, nullptr},
    {"RAdam", true, false, radam_variant, states<Radam, kRadamVariants>, Radam<0>::kSigns, 0,
     store_constants<RadamConstants, radam_constants>, 0, nullptr},
    {"Adamax", true, false, adamax_variant, states<Adamax, kAdamaxVariants>, Adamax<0>::kSigns, 0,
     store_constants<AdamaxConstants, adamax_constants>, 0, nullptr},
    {"Lion", false, false, lion_variant, states<Lion, kLionVariants>, Lion<0>::kSigns, 0,
     store_constants<LionConstants, lion_constants>, 0, nullptr},
    {"LAMB", true, false, lamb_variant, states<Lamb, kLambVariants>, Lamb<0>::kSigns, 0,
     store_constants<LambConstants, lamb_constants>, kLambProbe,
     adapt_constants<LambConstants, lamb_adapt>},
};
static_assert(sizeof kRules / sizeof *kRules == TT_RULES, "a rule has no row");

}  // namespace

const OptimRule& optim_rule(tt_rule rule) { return kRules[rule]; }

}  // namespace trimtab
