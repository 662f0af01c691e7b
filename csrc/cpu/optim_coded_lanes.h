// optim_step's loop for fp32 parameters with 8-bit states over a vector type V: a block of kDynamicBlock
// elements is decoded, updated and measured in one pass, stays in L1 as floats until its scales are known, and
// is encoded from there.
#pragma once
#include "optim_lanes.h"
#include "optim_memory_lanes.h"

namespace trimtab {
namespace {

// How far ahead memory is asked for: the encoding asks for nothing, and the hardware stops at pages.
constexpr int64_t kCodedAhead = 2 * kDynamicBlock;

// One block, into floats and scales; codes and scales point at its own.
template <class V, class Rule>
TT_INLINE void update_coded_block(const typename Rule::Constants& c, float* p, const float* g,
                                  const uint8_t* const* codes, float* const* scales,
                                  float (*floats)[kDynamicBlock]) {
  using U = typename WordsOf<V>::type;
  constexpr int kStates = Rule::kStates;
  V values[kStates], scale[kStates], largest[kStates];
  for (int k = 0; k < kStates; ++k) {
    scale[k] = V(*scales[k]);
    largest[k] = V(0.0f);
  }
  for (int i = 0; i < kDynamicBlock; i += V::lanes) {
    __builtin_prefetch(p + i + kCodedAhead, 1);
    __builtin_prefetch(g + i + kCodedAhead);
    for (int k = 0; k < kStates; ++k) {
      if (i % 64 == 0) __builtin_prefetch(codes[k] + i + kCodedAhead, 1);
      const V code = U::load_bytes(codes[k] + i).to_floats();
      const V value =
          Rule::kSigns >> k & 1 ? dynamic_value<true>(code) : dynamic_value<false>(code);
      values[k] = value * scale[k];
    }
    V param = V::load(p + i);
    Rule::update(c, param, V::load(g + i), values);
    param.store(p + i);
    for (int k = 0; k < kStates; ++k) {
      largest[k] = bits_max(largest[k], abs(values[k]));
      values[k].store(&floats[k][i]);
    }
  }
  for (int k = 0; k < kStates; ++k) *scales[k] = finite_scale(bits_max_across(largest[k]));
}

template <class V, class Rule>
TT_INLINE void encode_coded_block(const float (*floats)[kDynamicBlock], uint8_t* const* codes,
                                  float* const* scales) {
  for (int k = 0; k < Rule::kStates; ++k) {
    const auto encode =
        Rule::kSigns >> k & 1 ? encode_block<V, true, false> : encode_block<V, false, false>;
    encode(floats[k], *scales[k], RandomKey{}, 0, codes[k], kDynamicBlock);
  }
}

// A block is encoded after the next one's update, so that nothing waits for its scales.
template <class V, class Rule>
void update_coded(const void* constants, float* p, const float* g, uint8_t* const* codes,
                  float* const* scales, int64_t n) {
  constexpr int kStates = Rule::kStates;
  const typename Rule::Constants c = *static_cast<const typename Rule::Constants*>(constants);
  alignas(64) float floats[2][kStates][kDynamicBlock];
  uint8_t* code[2][kStates];
  float* scale[2][kStates];
  const int64_t blocks = n / kDynamicBlock;
  for (int64_t i = 0; i <= blocks; ++i) {
    const int now = int(i & 1);
    if (i < blocks) {
      const int64_t at = i * kDynamicBlock;
      for (int k = 0; k < kStates; ++k) {
        code[now][k] = codes[k] + at;
        scale[now][k] = scales[k] + i;
      }
      update_coded_block<V, Rule>(c, p + at, g + at, code[now], scale[now], floats[now]);
    }
    if (i > 0) encode_coded_block<V, Rule>(floats[1 - now], code[1 - now], scale[1 - now]);
  }
}

template <class V, class Rule>
constexpr OptimCodedFn update_coded_of() {
  if constexpr (Rule::kStates > 0) {
    return update_coded<V, Rule>;
  } else {
    return nullptr;
  }
}

// kTail: 8-bit states have no tail.
template <class V, template <int> class Rule, int kTail, int... kVariant>
OptimCodedFn pick_coded(int variant, std::integer_sequence<int, kVariant...>) {
  static constexpr OptimCodedFn table[] = {update_coded_of<V, Rule<(kVariant & ~kTail)>>()...};
  return table[variant];
}

template <class V, template <int> class Rule, int kVariants, int kTail = 0>
OptimCodedFn pick_coded(int variant) {
  return pick_coded<V, Rule, kTail>(variant, std::make_integer_sequence<int, kVariants>());
}

template <class V>
OptimCodedFn optim_coded(tt_rule rule, int variant) {
  switch (rule) {
    case TT_SGD: return pick_coded<V, Sgd, kSgdVariants>(variant);
    case TT_ADAM: return pick_coded<V, Adam, kAdamVariants, kAdamTail>(variant);
    case TT_ADAGRAD: return pick_coded<V, Adagrad, kAdagradVariants, kAdagradTail>(variant);
    case TT_RMSPROP: return pick_coded<V, Rmsprop, kRmspropVariants>(variant);
    case TT_NADAM: return pick_coded<V, Nadam, kNadamVariants>(variant);
    case TT_RADAM: return pick_coded<V, Radam, kRadamVariants>(variant);
    case TT_ADAMAX: return pick_coded<V, Adamax, kAdamaxVariants>(variant);
    case TT_LION: return pick_coded<V, Lion, kLionVariants>(variant);
    case TT_LAMB: return pick_coded<V, Lamb, kLambVariants, kLambProbe>(variant);
    default: return nullptr;
  }
}

}  // namespace
}  // namespace trimtab
