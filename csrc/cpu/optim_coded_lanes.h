// optim_step's loop for fp32 parameters with 8-bit states over a vector type V: a block of kDynamicBlock
// elements is decoded, updated and measured in one pass, stays in L1 as floats until its scales are known, and
// is encoded from there.
#pragma once
#include "optim_memory_lanes.h"
#include "optim_pick.h"

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

template <class V, class Rule, bool kStochastic>
void encode_coded_block(const float (*floats)[kDynamicBlock], uint8_t* const* codes,
                        float* const* scales, const RandomKey* keys, int64_t element) {
  for (int k = 0; k < Rule::kStates; ++k) {
    const auto encode = Rule::kSigns >> k & 1 ? encode_block<V, true, kStochastic>
                                              : encode_block<V, false, kStochastic>;
    const RandomKey key = kStochastic ? key_around(keys[k], element) : RandomKey{};
    encode(floats[k], *scales[k], key, uint32_t(element), codes[k], kDynamicBlock);
  }
}

// A block is encoded after the next one's update, so that nothing waits for its scales.
template <class V, class Rule>
void update_coded(const void* constants, float* p, const float* g, uint8_t* const* codes,
                  float* const* scales, const RandomKey* keys, int64_t element, int64_t n) {
  constexpr int kStates = Rule::kStates;
  const auto encode = keys ? encode_coded_block<V, Rule, true> : encode_coded_block<V, Rule, false>;
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
    if (i > 0) {
      const int64_t first = element + (i - 1) * kDynamicBlock;
      encode(floats[1 - now], code[1 - now], scale[1 - now], keys, first);
    }
  }
}

template <class V>
struct CodedLoops {
  template <class Rule>
  struct Of {
    static constexpr OptimCodedFn get() {
      if constexpr (Rule::kStates > 0) return update_coded<V, Rule>;
      return nullptr;
    }
  };
};

template <class V>
OptimCodedFn optim_coded(tt_rule rule, int variant) {
  return pick_whole<OptimCodedFn, CodedLoops<V>::template Of>(rule, variant);
}

}  // namespace
}  // namespace trimtab
