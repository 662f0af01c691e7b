// exp, tanh, erf and the activations relu, gelu, gelu_tanh, silu, once for every device.
//
// V is F32x1 (scalar, CUDA thread), F32x8 or F32x16. Every line is + - * / on fp32, rounded once
// each, or a compare, a select or an exponent shift, in this order and no other: that order is the
// definition (NUMERICS.md, section 4), and python/trimtab/reference/activation.py mirrors it line
// for line. Changing a coefficient or an association changes results everywhere: do not.
//
// Against float64, in ulp of the fp32 result, over all 2^32 inputs (tests/cpp/test_activation.cpp):
//
//            max ulp    at           monotone
//   exp        1.83     -0.00145     yes
//   tanh       1.96      0.486       yes
//   erf        2.50      1.09        yes
//   relu       0         -           yes
//   gelu       3.95     -0.139       no: 163269 of 2.1e9 neighbours fall for x >= 0
//   gelu_tanh  3.93     -9.40        yes for x >= 0
//   silu       3.62    -16.7         yes for x >= 0
//
// NaN gives NaN. gelu, gelu_tanh and silu go to -0.0 for -Inf, all four give -0.0 for -0.0.
//
// Coefficients are minimax fits (Remez exchange in 40 digits), rounded to fp32 one after the other,
// lowest order first, the rest fitted again after each. Polynomials use Horner's form: without fma
// it has the fewest instructions, and the loops around these functions have independent vectors to
// hide its latency.
#pragma once

#include "dtypes.h"

namespace trimtab {

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

namespace {

constexpr float kLog2e = 0x1.715476p+0f;
// ln 2 in two parts (Cody and Waite). The first has 16 bits, so n * kLn2Hi is exact for |n| < 2^8.
constexpr float kLn2Hi = 0x1.62e4p-1f;
constexpr float kLn2Lo = 0x1.7f7d1cp-20f;

// ((p x + c) x + ...) x + last coefficient
template <class V>
TT_INLINE V horner(V, V p) {
  return p;
}
template <class V, class... Rest>
TT_INLINE V horner(V x, V p, float c, Rest... rest) {
  return horner(x, p * x + c, rest...);
}

// e^r for 0 <= r <= ln 2 is horner(r, kExp5, ..., kExp1, 1), relative error 2^-23.5 before rounding.
// All coefficients and r are positive, so each rounded step is a non-decreasing function of r, and so
// is the whole: monotone by construction.
constexpr float kExp1 = 0x1.000064p+0f;
constexpr float kExp2 = 0x1.ffde24p-2f;
constexpr float kExp3 = 0x1.572706p-3f;
constexpr float kExp4 = 0x1.40005p-5f;
constexpr float kExp5 = 0x1.7e61c6p-7f;

// exp(x) = 2^n e^r,  n = floor(x / ln 2),  r = x - n ln 2 in [0, ln 2]
// Degree 6, error 2^-28 before rounding, so that e^r meets 2 at the upper end and exp(x) is 1 for
// tiny x of either sign; else as above. Over 88.7228 the result is Inf (n = 128), below -103.97
// it is 0.
template <class V>
TT_INLINE V exp(V x) {
  const V c = max(V(-104.5f), min(V(89.0f), x));
  const V n = floor(c * kLog2e);
  const V r = (c - n * kLn2Hi) - n * kLn2Lo;
  const V m = horner(r, V(0x1.fe47d8p-10f), 0x1.fefd2ap-8f, 0x1.5755b8p-5f, 0x1.553884p-3f,
                     0x1.0000bap-1f, 0x1.fffffap-1f, 1.0f);
  return ldexp(m, n);
}

// tanh(x) = t + t^3 P(t^2)          t = |x| < 0.58
//         = 1 - 2 / (e^(2t) + 1)    otherwise; with the sign of x
// The first form is monotone because the correction's slope and rounding stay below one ulp of t,
// the second by construction. n <= 28 here: one fp32 of ln 2 (21 bits, off by 1.9e-9) is enough,
// since the error of n ln 2 is damped by (1 - tanh^2) / 2.
template <class V>
TT_INLINE V tanh(V x) {
  const V t = min(V(10.0f), abs(x));
  const V z = t * t;
  const V p = horner(z, V(0x1.ff9d04p-7f), -0x1.abb8fcp-5f, 0x1.10a72p-3f, -0x1.555368p-2f);
  const V small = t + t * (z * p);
  const V n = floor(t * (2.0f * kLog2e));
  const V r = t - n * 0x1.62e43p-2f;  // ln 2 / 2
  const V m = horner(r, V(32.0f * kExp5), 16.0f * kExp4, 8.0f * kExp3, 4.0f * kExp2, 2.0f * kExp1,
                     1.0f);  // e^2r
  const V large = V(1.0f) - V(2.0f) / (scale2n(m, n) + 1.0f);
  return copysign(select(t < V(0.58f), small, large), x);
}

// erf(x) = t + t P(t^2)       t = |x| < 0.875
//        = 1 - e^(-g(h))      otherwise, g(t) = -ln erfc(t); with the sign of x
// g has a negative coefficient, so rounding may let it fall by an ulp. h is t with its last bit set:
// that doubles the distance between neighbours, and g rises over each (all 19 million were tried).
// (Clearing the bit would do as well, were it not for the NaN 0x7f800001, which becomes Inf.)
template <class V>
TT_INLINE V erf(V x) {
  const V t = min(V(4.0f), abs(x));
  const V z = t * t;
  const V p = horner(z, V(-0x1.3ba23p-11f), 0x1.479bacp-8f, -0x1.b69b88p-6f, 0x1.ce1b86p-4f,
                     -0x1.8126ecp-2f, 0x1.06eba6p-3f);
  const V small = t + t * p;
  const V h = bit_or(t, 1u);
  const V g = horner(h, V(0x1.4ee42cp-10f), -0x1.0281dap-6f, 0x1.779d9p-4f, 0x1.4cbeb8p-1f,
                     0x1.1eecdap+0f, 0x1.bffa9ap-10f);
  const V n = floor(g * -kLog2e);
  const V r = (n * -kLn2Hi - g) - n * kLn2Lo;
  const V m = horner(r, V(kExp5), kExp4, kExp3, kExp2, kExp1, 1.0f);
  const V large = V(1.0f) - scale2n(m, n);
  return copysign(select(t < V(0.875f), small, large), x);
}

// relu(x) = max(0, x);  relu(-0.0) = -0.0, relu(NaN) = NaN
template <class V>
TT_INLINE V relu(V x) {
  return max(V(0.0f), x);
}

// silu(x) = x / (1 + e^-x)
// With e^-x = 2^-n m, n = ceil(x / ln 2), 1 <= m <= 2:  x / (2^n + m) * 2^n. The last factor is the
// only step that can leave the normal range, so it rounds the subnormal tail once. Monotone for
// x >= 0, by construction.
// Above 18, 2^n + m rounds to 2^n and the result is x. At -111 and below it is -0.0.
template <class V>
TT_INLINE V silu(V x) {
  const V a = select(x <= V(-111.0f), V(-0.0f), x);
  const V c = min(V(18.0f), a);
  const V n = ceil(c * kLog2e);
  const V r = mul_sub_exact(n, V(kLn2Hi), c) + n * kLn2Lo;
  const V m = horner(r, V(kExp5), kExp4, kExp3, kExp2, kExp1, 1.0f);
  return ldexp(a / (m + pow2_addend(n)), n);
}

// gelu_tanh(x) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x / (1 + e^-y)
//   y = 2 sqrt(2/pi) (x + 0.044715 x^3) = (ln 2 / D) (x^3 + C x),  C = 1/0.044715, D = 9.71409
// y reaches -104 and its absolute error becomes a relative error of the result, so x^3 + C x is
// kept in two parts. h is x on the grid 2^-4 and C_hi, D_hi lie on 2^-9 and 2^-13, so that
// h (h^2 + C_hi) and n D_hi are whole multiples of 2^-13 below 2^11: exact. The rest,
//   x^3 + C x - h (h^2 + C_hi) = l (x^2 + x h + h^2 + C_hi) + C_lo x,   l = x - h, |l| <= 2^-5,
// is small. The sum is reduced by n D before it is scaled; then as silu, with e^-y = 2^-n m.
// Above 5.25 the result is x, at -10.8125 and below it is -0.0.
template <class V>
TT_INLINE V gelu_tanh(V x) {
  const V a = select(x <= V(-10.8125f), V(-0.0f), x);
  const V c = min(V(5.25f), a);
  const V h = (c + 786432.0f) - 786432.0f;  // 1.5 * 2^19: sums in [2^19, 2^20) have spacing 2^-4
  const V l = c - h;
  const V g = mul_add_exact(h, h, V(0x1.65dp+4f));  // C_hi = 22.36328125
  const V hi = h * g;
  const V lo = l * ((c + h) * c + g);
  const V n = ceil((hi + lo) * 0x1.a5a7dp-4f);  // 1 / D
  const V tiny = n * -0x1.549446p-16f - c * 0x1.2f6ecep-11f;  // n D_lo - C_lo x
  const V r = mul_sub_exact(n, V(0x1.36dap+3f), hi) - (lo - tiny);  // D_hi
  const V m = horner(r, V(0x1.72ca1ep-26f), 0x1.0fd906p-20f, 0x1.fea30ep-15f, 0x1.4d976p-9f,
                     0x1.244564p-4f, 1.0f);  // 2^(r/D)
  return ldexp(a / (m + pow2_addend(n)), n);
}

// gelu(x) = x Phi(x) = max(0, x) - t Phi(-t),  t = |x|,  Phi the normal distribution function
//   t Phi(-t) = e^(-t^2/2) q(t),  q(t) = t / M(t)
//   M(t) = e^(-t^2/2) / Phi(-t) = g t + E(t) / D(t),  from 2 at t = 0 to sqrt(2 pi) t
// The form with g t + E/D rather than one quotient of polynomials damps the rounding errors of D
// (it stands above and below) and of E (it fades for large t).
// e^(-t^2/2): t^2 = u + v with u = h^2 exact, h = t cut to 12 bits, v = (t - h)(t + h). With
// n = rint(-u / (2 ln 2)) it is 2^n e^(-r/2), r = u + v + 2n ln 2, and e^(-r/2) = 1 + s enters as
// q + q s, which rounds less than q (1 + s).
// One sign rule serves both sides: for x < 0, max(-0, x) - w = -w. At -14.5 and below it is -0.0, from 6
// on it is x: there t is set to 0, because a w that underflows costs an x86 core 150 cycles a vector
// (5 times the whole product at 16384 x 384 x 1536 on inputs of standard deviation 20). silu and
// gelu_tanh step around their underflow likewise; the bits are those of the formula.
template <class V>
TT_INLINE V gelu(V x) {
  const V t = select((x > V(-14.5f)) & (x < V(6.0f)), abs(x), V(0.0f));
  const V h = bit_and(t, 0xfffff000u);
  const V u = h * h;
  const V v = (t - h) * (t + h);
  const V n = rint(u * (-0.5f * kLog2e));
  const V r = mul_add_exact(n, V(2.0f * kLn2Hi), u) + (n * (2.0f * kLn2Lo) + v);
  const V d = horner(t, t + 0x1.2ae0fp+3f, 0x1.431b4p+5f, 0x1.74aeb2p+6f, 0x1.95478ep+6f);
  const V e = horner(t, V(0x1.3fd718p+1f), 0x1.797fb2p+4f, 0x1.7835fcp+6f, 0x1.95478ep+7f);
  const V td = t * d;
  const V q = td / (td * 0x1.40d95ap+1f + e);
  const V s = r * horner(r, V(0x1.6882fap-16f), -0x1.123f3ap-12f, 0x1.555acp-9f, -0x1.55548ap-6f,
                         0x1.fffffap-4f, -0.5f);
  return max(V(-0.0f), x) - ldexp(q + q * s, n);
}

template <Activation A, class V>
TT_INLINE V activate(V x) {
  if constexpr (A == Activation::relu) {
    return relu(x);
  } else if constexpr (A == Activation::gelu) {
    return gelu(x);
  } else if constexpr (A == Activation::gelu_tanh) {
    return gelu_tanh(x);
  } else if constexpr (A == Activation::silu) {
    return silu(x);
  } else {
    return x;
  }
}

}  // namespace
}  // namespace trimtab
