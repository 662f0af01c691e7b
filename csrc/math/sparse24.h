// 2:4 by magnitude (NUMERICS.md section 5): which two of four stay, as four bits.
#pragma once
#include "math/dtypes.h"

namespace trimtab {

// The magnitude of a weight as an integer of the same order: the bits without the sign. NaN comes on top, above
// Inf; -0 is 0.
template <class T>
struct Score24 {
  static constexpr uint32_t kInf = 0;  // from the next one on it is a NaN; 0: there is none
};
template <>
struct Score24<float> {
  static constexpr uint32_t kInf = 0x7f800000u;
};
template <>
struct Score24<bf16> {
  static constexpr uint32_t kInf = 0x7f80u;
};
template <>
struct Score24<fp16> {
  static constexpr uint32_t kInf = 0x7c00u;
};

namespace {

TT_INLINE uint32_t score24(float w) { return float_bits(w) & 0x7fffffffu; }
TT_INLINE uint32_t score24(bf16 w) { return w.bits & 0x7fffu; }
TT_INLINE uint32_t score24(fp16 w) { return w.bits & 0x7fffu; }
TT_INLINE uint32_t score24(int8_t w) { return uint32_t(w < 0 ? -int32_t(w) : int32_t(w)); }

// The positions of the two largest of four scores, the lower in bits 0 and 1, the higher in bits 2 and 3. Of
// equal scores the lower position stays: a later one goes before an earlier one only if it is larger.
//
// A tournament: the winners of both pairs meet; second is the other pair's winner or the best one's partner.
TT_INLINE uint32_t code24(uint32_t s0, uint32_t s1, uint32_t s2, uint32_t s3) {
  const bool b = s1 > s0, d = s3 > s2;
  const uint32_t first = b ? 1u : 0u, third = d ? 3u : 2u;  // the winners; first < third
  const uint32_t most01 = b ? s1 : s0, least01 = b ? s0 : s1;
  const uint32_t most23 = d ? s3 : s2, least23 = d ? s2 : s3;
  if (most23 >
      most01)  // third is best; its partner, 5 - third, only if larger than all of the first pair
    return least23 > most01 ? 0b1110u : first | third << 2;
  return most23 > least01 ? first | third << 2 : 0b0100u;  // else 0 and 1
}

}  // namespace
}  // namespace trimtab
