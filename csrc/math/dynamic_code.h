// Dynamic 8-bit codes for optimizer states, 256 elements a block (Dettmers et al., "8-bit Optimizers via
// Block-wise Quantization", ICLR 2022, https://arxiv.org/abs/2110.02861, section 2.1):
//
//   state = scale * value(code),   scale = max |state| of the block
//
// The values of a code lie in seven decades, more of them the nearer to 1: decade i = 0..6 from 10^(i-7)
// to 10^(i-6) is cut into n_i equal bins, whose middles are the values; n_i = 2^i for a code with sign,
// 2^(i+1) without. Besides there are 0 and 1. In rising order, which is that of the codes:
//
//   with sign      code = 127 + s,  value = sign(s) * magnitude(|s|),   s = -127..128
//   without        code = t - 1,    value = magnitude(t),               t = 1..256
//
// Decade i holds t in [n_i, 2 n_i): its number is the exponent of t as a float, and
//
//   magnitude(t) = 10^(i-6) * (0.1 + 0.9 * (t - n_i + 0.5) / n_i) = fma(t, slope_i, offset_i)
//
// with slope_i and offset_i rounded to fp32 once: this is the table, pinned. Below the first decade it is
// 0, and 1 for the t after the last. A block that holds a NaN or Inf has the scale NaN: all of it reads NaN.
#pragma once
#include "u32x1.h"

namespace trimtab {

constexpr int kDynamicBlock = 256;

// Where y lies: entry (e + 127) & 31 is for the y of exponent e, of which at most one begins a decade.
struct DynamicDecades {
  float threshold[32];  // from there on a y of this exponent is in the upper decade
  float lower[32];  // the first t of the lower one, half that of the upper
};

// Tables of eight are indexed by exponents too: entry (e + 127) & 7 belongs to the t of exponent e.
struct DynamicCode {
  float first,
      last;  // the t of the smallest magnitude that is not zero, 1 or 2; of the magnitude 1
  float slope[8], offset[8];  // of magnitude(t)
  float inverse[8], inverse_offset[8];  // t, not yet an integer, = fma(y, inverse, inverse_offset)
  DynamicDecades
      nearest;  // decades begin where y is nearer to their smallest value than to what is below
  DynamicDecades lowest;  // decades begin at their smallest value
};

namespace {

// thresholds: where each decade, and the value 1, begins
constexpr DynamicDecades dynamic_decades(int first, const double (&thresholds)[8]) {
  DynamicDecades d{};
  for (int k = 0; k < 32; ++k) d.threshold[k] = 4.0f;  // none
  double power = 1.0 / 8388608.0;  // 2^e
  int decade = 0;
  for (int e = -23; e <= 0; ++e, power *= 2.0) {
    const int at = (e + 127) & 31;
    while (decade < 8 && thresholds[decade] < power) ++decade;
    d.lower[at] = float(first << decade) * 0.5f;  // below all: half the first
    if (decade < 8 && thresholds[decade] < 2.0 * power) d.threshold[at] = float(thresholds[decade]);
  }
  return d;
}

constexpr DynamicCode dynamic_code(bool is_signed) {
  constexpr double kTop[8] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 0.0};
  DynamicCode c{};
  const int first = is_signed ? 1 : 2, first_exponent = is_signed ? 0 : 1;
  c.first = float(first);
  c.last = float(first << 7);
  double below = 0.0;  // the largest magnitude of the decade before
  double nearest[8] = {}, lowest[8] = {};
  for (int i = 0; i < 8; ++i) {
    const int at = (first_exponent + i + 127) & 7;
    const double n = double(first << i);
    const double slope = 0.9 * kTop[i] / n;
    const double offset = i < 7 ? kTop[i] * (0.45 / n - 0.8) : 1.0;
    c.slope[at] = float(slope);
    c.offset[at] = float(offset);
    c.inverse[at] = i < 7 ? float(1.0 / slope) : 0.0f;
    c.inverse_offset[at] = i < 7 ? float(-offset / slope) : float(n);
    lowest[i] = n * slope + offset;
    nearest[i] = 0.5 * (below + lowest[i]);
    below = (2.0 * n - 1.0) * slope + offset;
  }
  c.nearest = dynamic_decades(first, nearest);
  c.lowest = dynamic_decades(first, lowest);
  return c;
}

template <bool kSigned>
struct DynamicTable {
  static constexpr DynamicCode code = dynamic_code(kSigned);
};

template <class V>
TT_INLINE typename WordsOf<V>::type exponent_index(V t) {
  return typename WordsOf<V>::type(t) >> 23;
}

template <bool kSigned, class V>
TT_INLINE V dynamic_magnitude(V t) {
  constexpr const DynamicCode& c = DynamicTable<kSigned>::code;
  const auto at = exponent_index(t);
  return select(t < V(c.first), V(0.0f), fma(t, at.lookup8(c.slope), at.lookup8(c.offset)));
}

// value(code), for the code as a number.
template <bool kSigned, class V>
TT_INLINE V dynamic_value(V code) {
  if (!kSigned) return dynamic_magnitude<false>(code + V(1.0f));
  const V s = code - V(127.0f);
  return copysign(dynamic_magnitude<true>(abs(s)), s);
}

// The code of t, for an element with the sign of x. -1 has none: the next is 127 steps below 0.
template <bool kSigned, class V>
TT_INLINE V dynamic_finish(V t, V x) {
  return kSigned ? max(V(0.0f), copysign(t, x) + V(127.0f)) : t - V(1.0f);
}

// |x| * inverse; 2^-23, which is coded like 0, for less and for NaN.
template <class V>
TT_INLINE V dynamic_ratio(V x, V inverse) {
  return max(abs(x) * inverse, V(1.1920928955078125e-7f));
}

// The smallest t of the decade of y; half the first below all decades. There the t that the tables give is
// that of 1, whose entry it shares, and the largest t of the decade is what stands for zero.
template <class V>
TT_INLINE V dynamic_begin(V y, const DynamicDecades& decades) {
  const auto at = exponent_index(y);
  const V lower = at.lookup32(decades.lower);
  return select(y >= at.lookup32(decades.threshold), lower + lower, lower);
}

// The code whose value is nearest to x * inverse; |x| * inverse in [0, 1], and x >= 0 without sign.
template <bool kSigned, class V>
TT_INLINE V dynamic_nearest(V x, V inverse) {
  constexpr const DynamicCode& c = DynamicTable<kSigned>::code;
  const V y = dynamic_ratio(x, inverse);
  const V begin = dynamic_begin(y, c.nearest);
  const auto at = exponent_index(begin);
  const V t = rint(fma(y, at.lookup8(c.inverse), at.lookup8(c.inverse_offset)));
  return dynamic_finish<kSigned>(min(t, begin + (begin - V(1.0f))), x);
}

// One of the two codes around x * inverse, the upper with the probability that makes the mean right;
// u is uniform in [0, 1).
template <bool kSigned, class V>
TT_INLINE V dynamic_stochastic(V x, V inverse, V u) {
  constexpr const DynamicCode& c = DynamicTable<kSigned>::code;
  const V y = dynamic_ratio(x, inverse);
  const V begin = dynamic_begin(y, c.lowest);
  const auto at = exponent_index(begin);
  V t = floor(fma(y, at.lookup8(c.inverse), at.lookup8(c.inverse_offset)));
  t = max(V(c.first - 1.0f), min(t, begin + (begin - V(1.0f))));
  const V low = dynamic_magnitude<kSigned>(t), high = dynamic_magnitude<kSigned>(t + V(1.0f));
  t = select(u * (high - low) < y - low, t + V(1.0f), t);
  return dynamic_finish<kSigned>(min(t, V(c.last)), x);
}

}  // namespace
}  // namespace trimtab
