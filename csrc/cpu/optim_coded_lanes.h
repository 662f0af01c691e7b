// optim_step's loop for fp32 parameters with 8-bit states over a vector type V: a block of kDynamicBlock
// elements is decoded, updated and measured in one pass, stays in L1 as floats until its scales are known, and
// is encoded from there.
#pragma once
#include "optim_memory_lanes.h"
#include "optim_pick.h"
#include "pair.h"

namespace trimtab {
namespace {

// How far ahead memory is asked for: the encoding asks for nothing, and the hardware stops at pages.
constexpr int64_t kCodedAhead = 2 * kDynamicBlock;

// One block on its way through: its states as floats, where their codes and scales go.
template <int kStates>
struct CodedBlock {
  alignas(64) float floats[kStates][kDynamicBlock];
  uint8_t* codes[kStates];
  float* scales[kStates];
};

// Four vectors of each state of a block whose scales are known, from element i of it on.
template <class V, class Rule, bool kStochastic>
TT_INLINE void encode_group(const CodedBlock<Rule::kStates>& block, const V* inverse,
                            const RandomKey* keys, uint32_t element, int i) {
  for (int k = 0; k < Rule::kStates; ++k) {
    const float* from = &block.floats[k][i];
    uint8_t* to = block.codes[k] + i;
    if (Rule::kSigns >> k & 1) {
      encode_vectors<V, true, kStochastic>(from, inverse[k], keys[k], element + uint32_t(i), to);
    } else {
      encode_vectors<V, false, kStochastic>(from, inverse[k], keys[k], element + uint32_t(i), to);
    }
  }
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

// Updates `block`, and encodes the one `before` it meanwhile: dividing and taking roots leaves room for that.
template <class V, class Rule, bool kStochastic, bool kEncodes>
TT_INLINE void update_coded_block(const typename Rule::Constants& c, float* p, const float* g,
                                  CodedBlock<Rule::kStates>& block,
                                  const CodedBlock<Rule::kStates>& before, const RandomKey* keys,
                                  uint32_t element) {
  constexpr int kStates = Rule::kStates, kGroup = 4 * V::lanes;
  V scale[kStates], inverse[kStates], largest[kStates];
  for (int k = 0; k < kStates; ++k) {
    scale[k] = V(*block.scales[k]);
    largest[k] = V(0.0f);
    if (kEncodes) inverse[k] = V(inverse_scale(*before.scales[k]));
  }
  for (int i = 0; i < kDynamicBlock; i += kGroup) {
    Four<V> values[kStates];
    for (int k = 0; k < kStates; ++k) {
      __builtin_prefetch(block.codes[k] + i + kCodedAhead, 1);
      values[k] = decode_four(Rule::kSigns >> k & 1, block.codes[k] + i, scale[k]);
    }
    for (int line = 0; line < kGroup; line += 16) {
      __builtin_prefetch(p + i + line + kCodedAhead, 1);
      __builtin_prefetch(g + i + line + kCodedAhead);
    }
    Four<V> param = Four<V>::load(p + i);
    Rule::update(c, param, Four<V>::load(g + i), values);
    param.store(p + i);
    for (int k = 0; k < kStates; ++k) {
      for (const V x :
           {values[k].low.low, values[k].low.high, values[k].high.low, values[k].high.high}) {
        largest[k] =
            Rule::kSigns >> k & 1 ? bits_max(largest[k], abs(x)) : unsigned_max(largest[k], x);
      }
      values[k].store(&block.floats[k][i]);
    }
    if (kEncodes) encode_group<V, Rule, kStochastic>(before, inverse, keys, element, i);
  }
  for (int k = 0; k < kStates; ++k) *block.scales[k] = finite_scale(bits_max_across(largest[k]));
}

template <class V, class Rule, bool kStochastic>
void encode_coded_block(const CodedBlock<Rule::kStates>& block, const RandomKey* keys,
                        uint32_t element) {
  V inverse[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) inverse[k] = V(inverse_scale(*block.scales[k]));
  for (int i = 0; i < kDynamicBlock; i += 4 * V::lanes)
    encode_group<V, Rule, kStochastic>(block, inverse, keys, element, i);
}

template <class V, class Rule, bool kStochastic>
void update_coded_blocks(const typename Rule::Constants& constants, float* p, const float* g,
                         uint8_t* const* codes, float* const* scales, const RandomKey* keys,
                         int64_t element, int64_t n) {
  constexpr int kStates = Rule::kStates;
  const typename Rule::Constants c = constants;
  CodedBlock<kStates> blocks[2];
  RandomKey around[kStates] = {};
  const auto open = [&](int64_t i) {
    CodedBlock<kStates>& block = blocks[i & 1];
    for (int k = 0; k < kStates; ++k) {
      block.codes[k] = codes[k] + i * kDynamicBlock;
      block.scales[k] = scales[k] + i;
    }
  };
  const auto element_of = [&](int64_t i) {
    const int64_t first = element + i * kDynamicBlock;
    for (int k = 0; k < kStates; ++k)
      if (kStochastic) around[k] = key_around(keys[k], first);
    return uint32_t(first);
  };
  const int64_t count = n / kDynamicBlock;
  open(0);
  update_coded_block<V, Rule, kStochastic, false>(c, p, g, blocks[0], blocks[1], around, 0);
  for (int64_t i = 1; i < count; ++i) {
    open(i);
    const uint32_t first = element_of(i - 1);
    update_coded_block<V, Rule, kStochastic, true>(c, p + i * kDynamicBlock, g + i * kDynamicBlock,
                                                   blocks[i & 1], blocks[1 - (i & 1)], around,
                                                   first);
  }
  const uint32_t first = element_of(count - 1);
  encode_coded_block<V, Rule, kStochastic>(blocks[(count - 1) & 1], around, first);
}

template <class V, class Rule>
void update_coded(const void* constants, float* p, const float* g, uint8_t* const* codes,
                  float* const* scales, const RandomKey* keys, int64_t element, int64_t n) {
  const auto loop = keys ? update_coded_blocks<V, Rule, true> : update_coded_blocks<V, Rule, false>;
  loop(*static_cast<const typename Rule::Constants*>(constants), p, g, codes, scales, keys, element,
       n);
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
