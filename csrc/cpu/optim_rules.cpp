#include "cpu/optim_rules.h"

#include <utility>

#include "math/adagrad.h"
#include "math/adamax.h"
#include "math/adamw.h"
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

// In the order of tt_rule.
constexpr OptimRule kRules[] = {
    {"SGD", false, false, sgd_variant, states<Sgd, kSgdVariants>, 0,
     store_constants<SgdConstants, sgd_constants>},
    {"Adam", true, false, adam_variant, states<Adam, kAdamVariants>, kAdamTail,
     store_constants<AdamConstants, adam_constants>},
    {"Adagrad", true, false, adagrad_variant, states<Adagrad, kAdagradVariants>, kAdagradTail,
     store_constants<AdagradConstants, adagrad_constants>},
    {"RMSprop", true, false, rmsprop_variant, states<Rmsprop, kRmspropVariants>, 0,
     store_constants<RmspropConstants, rmsprop_constants>},
    {"NAdam", true, true, nadam_variant, states<Nadam, kNadamVariants>, 0,
     store_constants<NadamConstants, nadam_constants>},
    {"RAdam", true, false, radam_variant, states<Radam, kRadamVariants>, 0,
     store_constants<RadamConstants, radam_constants>},
    {"Adamax", true, false, adamax_variant, states<Adamax, kAdamaxVariants>, 0,
     store_constants<AdamaxConstants, adamax_constants>},
    {"Lion", false, false, lion_variant, states<Lion, kLionVariants>, 0,
     store_constants<LionConstants, lion_constants>},
};
static_assert(sizeof kRules / sizeof *kRules == TT_RULES, "a rule has no row");

}  // namespace

const OptimRule& optim_rule(tt_rule rule) { return kRules[rule]; }

}  // namespace trimtab
