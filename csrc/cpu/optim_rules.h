// The table of update rules as the machine sees them: what a tensor of a group needs, and its constants.
#pragma once
#include "cpu/optim_kernels.h"
#include "math/optim_rule.h"

namespace trimtab {

struct OptimRule {
  const char* name;
  bool counts_steps;  // needs tt_optim_tensor::step
  bool has_product;  // needs tt_optim_tensor::product
  int (*variant)(const tt_optim_group& group, bool fresh);
  int (*states)(int variant);
  unsigned signs;  // bit k: state k can be negative
  int tail;  // what turns a variant into that of torch's tails; 0: they agree with the rest
  void (*constants)(const tt_optim_group& group, const RuleStep& at, float* out);
  // Of a rule that steps by the norms of a tensor: what turns a variant into one that leaves the direction
  // in the parameter's place, and how both norms enter the constants. 0 and NULL: the rule has none.
  int probe;
  void (*adapt)(float* constants, double param_norm, double direction_norm);
};

const OptimRule& optim_rule(tt_rule rule);

}  // namespace trimtab
