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

// Decades are counted from 1, below them all is 0, and the value 1 is number 8; number k holds
// t < first * 2^k. Of the y of one exponent e at most the upper part is in the next decade, so that the decade
// is found in one of two ways:
//
//   at = bits(y) + carry[e] >> 23     the exponent itself, or the next: tables of 32 exponents follow
//   k  = guess + (y >= threshold[guess]),  guess = (e + 127) * kDynamicDecade >> 16, less 32
//
// A table of 8 or 16 is read at the low bits of k. Number 0 shares the inverse of 8, which makes it 0.
constexpr int kDynamicDecade = 20350;  // about log10(2) * 2^16; dynamic_bounds() checks it

struct DynamicBounds {
  float threshold[8];  // where the next decade begins
  uint32_t carry[32];  // of exponent (e + 127) & 31; so are these, for all y below a threshold:
  float inverse[32], limit[32];
};

struct DynamicCode {
  float first,
      last;  // the t of the smallest magnitude that is not zero, 1 or 2; of the magnitude 1
  // Of magnitude(t), by exponents: entries (e + 127) & 7 and & 15 belong to the t of exponent e; read at four
  // bits they have zeros for what is below first, and not below first / 2.
  float slope[16], offset[16];
  // t, not yet an integer, = fma(y, inverse, fma(limit, 4/9, -1/18)), but no more than limit.
  float inverse[8], limit[16];
  DynamicBounds
      nearest;  // a decade begins where y is nearer to its smallest value than to what is below
  DynamicBounds lowest;  // a decade begins at its smallest value
};

constexpr float kDynamicRise = float(4.0 / 9.0), kDynamicShift = float(-1.0 / 18.0);

namespace {

// Throws, which no constant can, where one exponent has two thresholds or a guess is too far off.
constexpr DynamicBounds dynamic_bounds(const DynamicCode& c, const double (&thresholds)[8]) {
  DynamicBounds b{};
  for (int k = 0; k < 8; ++k) b.threshold[k] = float(thresholds[k]);
  double power = 1.0 / 8388608.0;  // 2^e
  for (int e = -23; e <= 1; ++e, power *= 2.0) {
    int k = 0, next = 0;
    while (k < 8 && thresholds[k] < power) ++k;
    while (next < 8 && thresholds[next] < 2.0 * power) ++next;
    const int at = (e + 127) & 31;
    b.inverse[at] = c.inverse[k & 7];
    b.limit[at] = c.limit[k];
    if (next > k) {
      const double mantissa = double(float(thresholds[k])) / power - 1.0;
      b.carry[at] = 0x800000u - uint32_t(mantissa * 8388608.0);
    }
    const int guess = ((e + 127) * kDynamicDecade >> 16) - 32;
    if (next > k + 1 || (e <= 0 && (guess < 0 || guess > k || guess + 1 < next))) throw e;
  }
  return b;
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
    const int exponent = first_exponent + i + 127;
    const double n = double(first << i);
    const double slope = 0.9 * kTop[i] / n;
    const double offset = i < 7 ? kTop[i] * (0.45 / n - 0.8) : 1.0;
    c.slope[exponent & 7] = c.slope[exponent & 15] = float(slope);
    c.offset[exponent & 7] = c.offset[exponent & 15] = float(offset);
    const double limit = 2.0 * n - 1.0;
    const double at_0 = limit * double(kDynamicRise) + double(kDynamicShift);
    c.limit[i + 1] = float(limit);
    // Of 1 alone, with a quarter to spare for both roundings.
    c.inverse[(i + 1) & 7] = float(i < 7 ? 1.0 / slope : n + 0.25 - at_0);
    if (i < 7 && float(at_0) != float(-offset / slope)) throw i;
    lowest[i] = n * slope + offset;
    nearest[i] = 0.5 * (below + lowest[i]);
    below = limit * slope + offset;
  }
  c.limit[0] = float(first - 1);
  c.nearest = dynamic_bounds(c, nearest);
  c.lowest = dynamic_bounds(c, lowest);
  return c;
}

// Of codes with sign, as vectors of 16 read them: for f = 4 s, which has the exponents 2 to 9, and 0 for s = 0.
struct DynamicQuadruple {
  float slope[16], offset[16];  // entry (e + 127) & 15 belongs to the f of exponent e, entry 0 to 0
};

constexpr DynamicQuadruple dynamic_quadruple(const DynamicCode& c) {
  DynamicQuadruple q{};
  for (int i = 0; i < 8; ++i) {
    q.slope[i + 1] = 0.25f * c.slope[(i + 127) & 15];
    q.offset[i + 1] = c.offset[(i + 127) & 15];
  }
  return q;
}

// For rounding to one of two neighbours, as vectors of 16 read them. Of y of exponent e, as in DynamicBounds:
// carry leads to a number `at`, which has the line, and that of the magnitude of the t on it. All magnitudes
// are multiplied by 2^-24, which changes no digit.
struct DynamicNeighbours {
  uint32_t carry[32];
  float inverse[32], limit[32], slope[32], offset[32];  // below the first decade t is first - 1
  float upper_slope[16], upper_offset[16];  // by exponents of t: entry (e + 127) & 15
};

constexpr DynamicNeighbours dynamic_neighbours(const DynamicCode& c) {
  constexpr float kUnit = 5.9604644775390625e-8f;  // 2^-24
  DynamicNeighbours d{};
  for (int i = 0; i < 16; ++i) {
    d.upper_slope[i] = c.slope[i] * kUnit;
    d.upper_offset[i] = c.offset[i] * kUnit;
  }
  for (int at = 0; at < 32; ++at) {
    d.carry[at] = c.lowest.carry[at];
    d.limit[at] = c.lowest.limit[at];
    const bool below =
        d.limit[at] < c.first;  // there 2^-23 * 2^23 is enough to be cut off at the limit
    d.inverse[at] = below ? 8388608.0f : c.lowest.inverse[at];
    int exponent = 127;  // of the decade's t, between limit / 2 and limit
    for (float power = 1.0f; 2.0f * power <= d.limit[at]; power *= 2.0f) ++exponent;
    d.slope[at] = below ? 0.0f : d.upper_slope[exponent & 15];
    d.offset[at] = below ? 0.0f : d.upper_offset[exponent & 15];
  }
  return d;
}

template <bool kSigned>
struct DynamicTable {
  static constexpr DynamicCode code = dynamic_code(kSigned);
  static constexpr DynamicQuadruple quadruple = dynamic_quadruple(code);
  static constexpr DynamicNeighbours neighbours = dynamic_neighbours(code);
};

// Where the table of kSigned lies; CUDA, which keeps it in shared memory, says so itself.
#if !defined(TT_DYNAMIC_TABLE)
#define TT_DYNAMIC_TABLE DynamicTable<kSigned>::code
#endif

template <class V>
TT_INLINE typename WordsOf<V>::type exponent_index(V t) {
  return typename WordsOf<V>::type(t) >> 23;
}

// t >= first - 1
template <bool kSigned, class V>
TT_INLINE V dynamic_magnitude(V t) {
  const DynamicCode& c = TT_DYNAMIC_TABLE;
  if constexpr (WordsOf<V>::type::has_lookup32) {
    const V u = kSigned ? max(t, V(0.5f)) : t;
    const auto at = exponent_index(u);
    return fma(u, at.lookup16(c.slope), at.lookup16(c.offset));
  } else {
    const auto at = exponent_index(t);
    return select(t < V(c.first), V(0.0f), fma(t, at.lookup8(c.slope), at.lookup8(c.offset)));
  }
}

// value(code), for the code as a number.
template <bool kSigned, class V>
TT_INLINE V dynamic_value(V code) {
  if constexpr (!kSigned) return dynamic_magnitude<false>(code + V(1.0f));
  if constexpr (WordsOf<V>::type::has_lookup32) {  // a multiple of s makes 0 no exception
    constexpr const DynamicQuadruple& q = DynamicTable<true>::quadruple;
    const V f = fma(code, V(4.0f), V(-508.0f));
    const auto at = exponent_index(f);
    return fma(f, at.lookup16(q.slope), flip_sign(at.lookup16(q.offset), f));
  }
  const V s = code - V(127.0f);
  return copysign(dynamic_magnitude<true>(abs(s)), s);
}

// |x| * inverse; 2^-23, which is coded like 0, for less and for NaN.
template <bool kSigned, class V>
TT_INLINE V dynamic_ratio(V x, V inverse) {
  constexpr float kLeast = 1.1920928955078125e-7f;
  return kSigned ? max_magnitude(x * inverse, V(kLeast)) : max(x * inverse, V(kLeast));
}

template <class V>
struct DynamicLine {
  V inverse, limit;

  TT_INLINE V at(V y) const {
    return fma(y, inverse, fma(limit, V(kDynamicRise), V(kDynamicShift)));
  }
};

// The line that y is on, if decades begin at these bounds.
template <class V>
TT_INLINE DynamicLine<V> dynamic_line(V y, const DynamicCode& c, const DynamicBounds& bounds) {
  using U = typename WordsOf<V>::type;
  const U e = exponent_index(y);
  if constexpr (U::has_lookup32) {
    const U at = (U(y) + e.lookup32(bounds.carry)) >> 23;
    return {at.lookup32(bounds.inverse), at.lookup32(bounds.limit)};
  } else {
    const U guess = e.times_shift16(kDynamicDecade);
    const U at = guess.plus_one(y >= guess.lookup8(bounds.threshold));
    return {at.lookup8(c.inverse), at.lookup16(c.limit)};
  }
}

// The step of an element with the sign of x: the code less 127 with sign, plus 1 without.
template <bool kSigned, class V>
TT_INLINE V dynamic_step(V t, V x) {
  return kSigned ? copysign(t, x) : t;
}

// The code of a step is the step plus this, but at least 0: the step -128 has none, and the step 0 without
// sign is as good as 1, zero's.
template <bool kSigned>
constexpr int kDynamicBias = kSigned ? 127 : -1;

// The step whose value is nearest to x * inverse, once it is rounded to an integer; |x| * inverse in [0, 1],
// and x >= 0 without sign.
template <bool kSigned, class V>
TT_INLINE V dynamic_nearest(V x, V inverse) {
  const DynamicCode& c = TT_DYNAMIC_TABLE;
  const V y = dynamic_ratio<kSigned>(x, inverse);
  const DynamicLine<V> line = dynamic_line(y, c, c.nearest);
  return dynamic_step<kSigned>(min(line.at(y), line.limit), x);
}

// One of the two steps around x * inverse, the upper with the probability that makes the mean right;
// u is uniform in [0, 1).
template <bool kSigned, class V>
TT_INLINE V dynamic_stochastic(V x, V inverse, V u) {
  const DynamicCode& c = TT_DYNAMIC_TABLE;
  const V y = dynamic_ratio<kSigned>(x, inverse);
  const DynamicLine<V> line = dynamic_line(y, c, c.lowest);
  V t = max(V(c.first - 1.0f), min(floor(line.at(y)), line.limit));
  const V low = dynamic_magnitude<kSigned>(t), high = dynamic_magnitude<kSigned>(t + V(1.0f));
  t = select(u * (high - low) < y - low, t + V(1.0f), t);
  return dynamic_step<kSigned>(min(t, V(c.last)), x);
}

// The same of vectors that look up 32 numbers at once; random is u * 2^24. That y is on a line says where its t lies: at the lowest y of
// a decade the line gives the decade's first t. Nor can y <= 1 be led beyond the last.
template <bool kSigned, class V>
TT_INLINE V dynamic_stochastic32(V x, V inverse, V random) {
  using U = typename WordsOf<V>::type;
  constexpr const DynamicNeighbours& d = DynamicTable<kSigned>::neighbours;
  const V y = dynamic_ratio<kSigned>(x, inverse);
  const U at = (U(y) + exponent_index(y).lookup32(d.carry)) >> 23;
  const DynamicLine<V> line{at.lookup32(d.inverse), at.lookup32(d.limit)};
  const V t = min(floor(line.at(y)), line.limit), next = t + V(1.0f);
  const U upper = exponent_index(next);
  const V low = fma(t, at.lookup32(d.slope), at.lookup32(d.offset));
  const V high = fma(next, upper.lookup16(d.upper_slope), upper.lookup16(d.upper_offset));
  const V above = fma(low, V(-16777216.0f), y);  // rounds as y less the lower magnitude
  return dynamic_step<kSigned>(select(random * (high - low) < above, next, t), x);
}

}  // namespace
}  // namespace trimtab
