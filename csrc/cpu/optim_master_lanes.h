// optim_step's loop for bf16 parameters with a master, bf16 gradients and states, over a vector type V: from
// memory through registers and back, where blocks in L1 cost two more passes over each array.
#pragma once
#include "optim_memory_lanes.h"
#include "optim_pick.h"

namespace trimtab {
namespace {

// n: a multiple of the lanes.
template <class V, class Rule, class Master>
void update_master(const void* constants, bf16* p, uint16_t* master, const bf16* g,
                   void* const* state, int64_t n) {
  constexpr int kArrays = Rule::kStates > 0 ? Rule::kStates : 1;
  const typename Rule::Constants c = *static_cast<const typename Rule::Constants*>(constants);
  bf16* s[kArrays] = {};
  for (int k = 0; k < Rule::kStates; ++k) s[k] = static_cast<bf16*>(state[k]);
  V values[kArrays];
  for (int64_t i = 0; i < n; i += V::lanes) {
    V param = Master::open(p + i, master + i);
    for (int k = 0; k < Rule::kStates; ++k) values[k] = V::load(s[k] + i);
    Rule::update(c, param, V::load(g + i), values);
    Master::close(param, p + i, master + i);
    for (int k = 0; k < Rule::kStates; ++k) values[k].store(s[k] + i);
  }
}

template <class V, template <class> class Master>
struct MasterLoops {
  template <class Rule>
  struct Of {
    static constexpr OptimMasterFn get() { return update_master<V, Rule, Master<V>>; }
  };
};

template <class V>
OptimMasterFn optim_master(tt_rule rule, int variant, int kind) {
  if (kind == TT_MASTER_KAHAN)
    return pick_whole<OptimMasterFn, MasterLoops<V, Kahan>::template Of>(rule, variant);
  return pick_whole<OptimMasterFn, MasterLoops<V, Remainder>::template Of>(rule, variant);
}

}  // namespace
}  // namespace trimtab
