// optim_step's loop for bf16 parameters, gradients and states over a vector type V, with a master or rounding all
// stochastically: from memory through registers and back, where blocks in L1 cost two more passes over each
// array.
#pragma once
#include "optim_memory_lanes.h"
#include "optim_pick.h"

namespace trimtab {
namespace {

// No master: the upper or the lower bf16 neighbour.
template <class V>
struct Stochastic {
  static TT_INLINE V open(const bf16* p, const uint16_t*) { return V::load(p); }
  static TT_INLINE void store(V x, RandomKey key, uint32_t element, bf16* to) {
    using U = typename WordsOf<V>::type;
    stochastic_bf16(x, random_bits(key, U::from(element))).store16(reinterpret_cast<uint16_t*>(to));
  }
};

template <class V, class Rule, class Master>
void update_halves(const void* constants, const OptimHalves& arrays) {
  constexpr bool kStochastic = std::is_same<Master, Stochastic<V>>::value;
  constexpr int kStates = Rule::kStates;
  const typename Rule::Constants c = *static_cast<const typename Rule::Constants*>(constants);
  const OptimHalves a = arrays;  // a copy, whose address no store can have
  const V factor(a.factor);
  V values[kStates + 1];
  for (int64_t i = 0; i < a.n; i += V::lanes) {
    V param = Master::open(a.p + i, a.master + i);
    for (int k = 0; k < kStates; ++k) values[k] = V::load(a.states[k] + i);
    Rule::update(c, param, V::load(a.g + i) * factor, values);
    const uint32_t element = a.element + uint32_t(i);
    if constexpr (kStochastic) {
      Stochastic<V>::store(param, a.keys[0], element, a.p + i);
    } else {
      Master::close(param, a.p + i, a.master + i);
    }
    for (int k = 0; k < kStates; ++k) {
      if constexpr (kStochastic) {
        Stochastic<V>::store(values[k], a.keys[1 + k], element, a.states[k] + i);
      } else {
        values[k].store(a.states[k] + i);
      }
    }
  }
}

template <class V, class Master>
struct HalvesLoops {
  template <class Rule>
  struct Of {
    static constexpr OptimHalvesFn get() { return update_halves<V, Rule, Master>; }
  };
};

template <class V>
OptimHalvesFn optim_halves(tt_rule rule, int variant, int master) {
  if (master == TT_MASTER_NONE)
    return pick_whole<OptimHalvesFn, HalvesLoops<V, Stochastic<V>>::template Of>(rule, variant);
  if (master == TT_MASTER_KAHAN)
    return pick_whole<OptimHalvesFn, HalvesLoops<V, Kahan<V>>::template Of>(rule, variant);
  return pick_whole<OptimHalvesFn, HalvesLoops<V, Remainder<V>>::template Of>(rule, variant);
}

}  // namespace
}  // namespace trimtab
