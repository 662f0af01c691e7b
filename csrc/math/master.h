// What a bf16 parameter keeps beside itself so that small updates are not lost.
//
//   remainder   16 bits: the master is an fp32 number, exactly. Of its bits u the parameter holds
//               (u + 0x8000) >> 16, the nearest bf16 (ties away from zero), and the remainder u mod 2^16
//               as an int16: parameter * 2^16 + remainder = u, since where the remainder is negative the
//               parameter was rounded up by one. A NaN becomes 0x7fc00000: others could carry into the
//               sign.
//   kahan       bf16: the master is parameter + compensation, about sixteen bits of mantissa. The
//               parameter is the nearest bf16; what rounding took off is exact in fp32 and is kept, rounded
//               itself (Kahan 1965; Zamirai et al., https://arxiv.org/abs/2010.06192).
#pragma once
#include "u32x1.h"

namespace trimtab {
namespace {

// The master from its two halves, 16 bits in each word.
template <class V>
TT_INLINE V join_remainder(typename WordsOf<V>::type param, typename WordsOf<V>::type remainder) {
  using U = typename WordsOf<V>::type;
  const U extended = (remainder ^ U(0x8000u)) + U(0xffff8000u);  // the sign of 16 bits
  return ((param << 16) + extended).floats();
}

template <class V>
TT_INLINE void split_remainder(V master, typename WordsOf<V>::type* param,
                               typename WordsOf<V>::type* remainder) {
  using U = typename WordsOf<V>::type;
  const U u(select(is_nan(master), U(0x7fc00000u).floats(), master));
  *param = (u + U(0x8000u)) >> 16;
  *remainder = u & U(0xffffu);
}

// What a rounding to bf16 took off; 0 where the rounded number is not finite.
template <class V>
TT_INLINE V lost(V master, V rounded) {
  const V rest = master - rounded;
  return select(is_finite(rest), rest, V(0.0f));
}

}  // namespace
}  // namespace trimtab
