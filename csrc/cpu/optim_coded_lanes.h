// The step of a block with 8-bit states over a vector type V: it is decoded, updated and measured in one pass,
// stays in L1 as floats until its scales are known, and is encoded from there while the next one is updated.
//
// AdamW on AVX-512, operations for 16 elements on the two ports for vectors: decoding 8 without and 9 with sign,
// update 22 (a root 4, a division 3), largest magnitude 1 and 2, encoding 13.5 and 14.5: 70, or 35 cycles.
// Of these 14 run on one of the ports alone and 13 on the other, and the divider is taken for 22 cycles.
#pragma once
#include "optim_memory_lanes.h"
#include "optim_pick.h"
#include "pair.h"

namespace trimtab {
namespace {

// Four vectors of each state, from element i of the block on.
template <class V, int kStates, unsigned kSigns, bool kStochastic>
TT_INLINE void encode_group(const OptimCodedBlock& block, const V* inverse, int i) {
  for (int k = 0; k < kStates; ++k) {
    const float* from = &block.floats[k][i];
    uint8_t* to = block.codes[k] + i;
    const RandomKey key = kStochastic ? block.keys[k] : RandomKey{};
    const uint32_t element = block.element + uint32_t(i);
    if (kSigns >> k & 1) {
      encode_vectors<V, true, kStochastic>(from, inverse[k], key, element, to);
    } else {
      encode_vectors<V, false, kStochastic>(from, inverse[k], key, element, to);
    }
  }
}

template <class V, int kStates, unsigned kSigns, bool kStochastic>
void encode_coded(const OptimCodedBlock& block) {
  V inverse[kStates];
  for (int k = 0; k < kStates; ++k) inverse[k] = V(inverse_scale(*block.scales[k]));
  for (int i = 0; i < kDynamicBlock; i += 4 * V::lanes)
    encode_group<V, kStates, kSigns, kStochastic>(block, inverse, i);
}

template <class V>
using Four = Pair<Pair<V>>;

template <class V>
TT_INLINE Four<V> decode_four(bool is_signed, const uint8_t* codes, V scale) {
  using U = typename WordsOf<V>::type;
  V x[4];
  for (int j = 0; j < 4; ++j) {
    const V code = U::load_bytes(codes + j * V::lanes).to_floats();
    x[j] = (is_signed ? dynamic_value<true>(code) : dynamic_value<false>(code)) * scale;
  }
  return {{x[0], x[1]}, {x[2], x[3]}};
}

// max(so_far, |x|), lane by lane, of the bits as integers; x without sign is negative in a NaN only.
template <class V>
TT_INLINE V largest_of(bool is_signed, V so_far, Four<V> x) {
  for (const V v : {x.low.low, x.low.high, x.high.low, x.high.high})
    so_far = is_signed ? bits_max(so_far, abs(v)) : unsigned_max(so_far, v);
  return so_far;
}

// How far ahead memory is asked for: the encoding asks for nothing, and the hardware stops at pages.
constexpr int64_t kCodedAhead = 2 * kDynamicBlock;

template <class V, class Rule, bool kEncodes, bool kStochastic>
void update_coded_block(const void* constants, const OptimCodedBlock& block,
                        const OptimCodedBlock* before) {
  constexpr int kStates = Rule::kStates, kGroup = 4 * V::lanes;
  const typename Rule::Constants c = *static_cast<const typename Rule::Constants*>(constants);
  float* const p = block.p;
  V scale[kStates], inverse[kStates], largest[kStates];
  for (int k = 0; k < kStates; ++k) {
    scale[k] = V(*block.scales[k]);
    largest[k] = V(0.0f);
    if (kEncodes) inverse[k] = V(inverse_scale(*before->scales[k]));
  }
  for (int i = 0; i < kDynamicBlock; i += kGroup) {
    Four<V> values[kStates];
    for (int k = 0; k < kStates; ++k) {
      __builtin_prefetch(block.codes[k] + i + kCodedAhead, 1);
      values[k] = decode_four(Rule::kSigns >> k & 1, block.codes[k] + i, scale[k]);
    }
    for (int line = 0; line < kGroup * 4; line += 64) {
      __builtin_prefetch(block.p_ahead + 4 * i + line, 1);
      __builtin_prefetch(block.g_ahead + 4 * i + line);
    }
    Four<V> param = Four<V>::load(p + i);
    Rule::update(c, param, Four<V>::load(block.g + i), values);
    param.store(p + i);
    for (int k = 0; k < kStates; ++k) {
      largest[k] = largest_of(Rule::kSigns >> k & 1, largest[k], values[k]);
      values[k].store(&block.floats[k][i]);
    }
    if (kEncodes) encode_group<V, kStates, Rule::kSigns, kStochastic>(*before, inverse, i);
  }
  for (int k = 0; k < kStates; ++k) *block.scales[k] = finite_scale(bits_max_across(largest[k]));
}

template <class V, class Rule, bool kStochastic>
void update_coded(const void* constants, const OptimCodedBlock* updated,
                  const OptimCodedBlock* encoded) {
  constexpr unsigned kSigns = Rule::kSigns & ((1u << Rule::kStates) - 1);
  if (!updated) return encode_coded<V, Rule::kStates, kSigns, kStochastic>(*encoded);
  if (!encoded) return update_coded_block<V, Rule, false, false>(constants, *updated, nullptr);
  update_coded_block<V, Rule, true, kStochastic>(constants, *updated, encoded);
}

template <class V, bool kStochastic>
struct CodedLoops {
  template <class Rule>
  struct Of {
    static constexpr OptimCodedFn get() {
      if constexpr (Rule::kStates > 0) return update_coded<V, Rule, kStochastic>;
      return nullptr;
    }
  };
};

template <class V>
OptimCodedFn optim_coded(tt_rule rule, int variant, bool stochastic) {
  if (stochastic) return pick_whole<OptimCodedFn, CodedLoops<V, true>::template Of>(rule, variant);
  return pick_whole<OptimCodedFn, CodedLoops<V, false>::template Of>(rule, variant);
}

}  // namespace
}  // namespace trimtab
