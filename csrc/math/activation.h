// exp, tanh, erf and the activations relu, gelu, gelu_tanh, silu, once for every device.
//
// V is F32x1 (scalar, CUDA thread), F32x8 or F32x16. Every line is + - * / on fp32, rounded once
// each, or a compare, a select or an exponent shift, in this order and no other: that order is the
// definition (NUMERICS.md, section 4), and python/trimtab/reference/activation.py mirrors it line
// for line. Changing a coefficient or an association changes results everywhere: do not.
//
// Against float64, in ulp of the fp32 result, over all 2^32 inputs (tests/cpp/test_activation.cpp):
// @TABLE@
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

// e^(s r) for s = 1 and 2, and 2^(r / 9.714) for gelu_tanh, 0 <= r <= ln 2 / s (or 9.714), as
//   1 + r (c1 + r (c2 + r (c3 + r (c4 + r c5))))
// Error at most 2^-23 before rounding. All coefficients and r are positive, so each rounded step
// is a non-decreasing function of r, and so is the whole: monotone by construction.
template <class V>
TT_INLINE V exp_poly(V r, float c1, float c2, float c3, float c4, float c5) {
  return ((((r * c5 + c4) * r + c3) * r + c2) * r + c1) * r + 1.0f;
}

constexpr float kExp1 = 0x1.00008p+0f;
constexpr float kExp2 = 0x1.ffd7ccp-2f;
constexpr float kExp3 = 0x1.575facp-3f;
constexpr float kExp4 = 0x1.3e73fap-5f;
constexpr float kExp5 = 0x1.8219cap-7f;

// exp(x) = 2^n e^r,  n = floor(x / ln 2),  r = x - n ln 2 in [0, ln 2]
// Above 88.7228 it overflows to Inf (n = 128); below -103.97 it rounds to 0.
template <class V>
TT_INLINE V exp(V x) {
  const V c = max(V(-104.5f), min(V(89.0f), x));
  const V n = floor(c * kLog2e);
  const V r = (c - n * kLn2Hi) - n * kLn2Lo;
  return ldexp(exp_poly(r, kExp1, kExp2, kExp3, kExp4, kExp5), n);
}

// tanh(x) = t + t^3 P(t^2)          t = |x| < 0.6
//         = 1 - 2 / (e^(2t) + 1)    otherwise; with the sign of x
// The first form is monotone because the correction's slope and rounding stay below one ulp of t,
// the second by construction. n <= 28 here: one fp32 of ln 2 (21 bits, off by 1.9e-9) is enough,
// since the error of n ln 2 is damped by (1 - tanh^2) / 2.
template <class V>
TT_INLINE V tanh(V x) {
  const V t = min(V(10.0f), abs(x));
  const V z = t * t;
  const V p = ((z * 0x1.ff9d04p-7f + -0x1.abb8fcp-5f) * z + 0x1.10a72p-3f) * z + -0x1.555368p-2f;
  const V small = t + t * (z * p);
  const V n = floor(t * (2.0f * kLog2e));
  const V r = t - n * 0x1.62e43p-2f;  // ln 2 / 2
  const V m = exp_poly(r, 2.0f * kExp1, 4.0f * kExp2, 8.0f * kExp3, 16.0f * kExp4, 32.0f * kExp5);
  const V large = V(1.0f) - V(2.0f) / (scale2n(m, n) + 1.0f);
  return copysign(select(t < V(0.6f), small, large), x);
}

// erf(x) = t + t P(t^2)       t = |x| < 1
//        = 1 - e^(-g(t))      otherwise, g(t) = -ln erfc(t); with the sign of x
template <class V>
TT_INLINE V erf(V x) {
  const V t = min(V(4.0f), abs(x));
  const V z = t * t;
  const V p = ((((z * -0x1.272eb8p-11f + 0x1.423ba4p-8f) * z + -0x1.b59f52p-6f) * z
      + 0x1.ce08bep-4f) * z + -0x1.81267p-2f) * z + 0x1.06eba2p-3f;
  const V small = t + t * p;
  const V g = ((((t * 0x1.2d929ep-10f + -0x1.e43ee2p-7f) * t + 0x1.6b0b46p-4f) * t
      + 0x1.4f194p-1f) * t + 0x1.1e106cp+0f) * t + 0x1.5e3314p-9f;
  const V n = floor(g * -kLog2e);
  const V r = (n * -kLn2Hi - g) - n * kLn2Lo;
  const V m = exp_poly(r, kExp1, kExp2, kExp3, kExp4, kExp5);
  const V large = V(1.0f) - scale2n(m, n);
  return copysign(select(t < V(1.0f), small, large), x);
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
  const V a = max(V(-111.0f), x);
  const V c = min(V(18.0f), a);
  const V n = ceil(c * kLog2e);
  const V r = mul_sub_exact(n, V(kLn2Hi), c) + n * kLn2Lo;
  const V m = exp_poly(r, kExp1, kExp2, kExp3, kExp4, kExp5);
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
  const V a = max(V(-10.8125f), x);
  const V c = min(V(5.25f), a);
  const V h = (c + 786432.0f) - 786432.0f;  // 1.5 * 2^19: sums in [2^19, 2^20) have spacing 2^-4
  const V l = c - h;
  const V g = mul_add_exact(h, h, V(0x1.65dp+4f));  // C_hi = 22.36328125
  const V hi = h * g;
  const V lo = l * ((c + h) * c + g) + c * 0x1.2f6ecep-11f;  // C_lo
  const V n = ceil((hi + lo) * 0x1.a5a7dp-4f);               // 1 / D
  const V r = mul_sub_exact(n, V(0x1.36dap+3f), hi) + (n * -0x1.549446p-16f - lo);  // D_hi, D_lo
  const V m = exp_poly(r, 0x1.244584p-4f, 0x1.4d933cp-9f, 0x1.fef78p-15f, 0x1.0e87bap-20f,
                       0x1.76672ap-26f);
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
// One sign rule serves both sides: for x < 0, max(-0, x) - w = -w; at -14.5 and below it is -0.0.
template <class V>
TT_INLINE V gelu(V x) {
  const V t = min(V(14.5f), abs(x));
  const V h = bit_and(t, 0xfffff000u);
  const V u = h * h;
  const V v = (t - h) * (t + h);
  const V n = rint(u * (-0.5f * kLog2e));
  const V r = mul_add_exact(n, V(2.0f * kLn2Hi), u) + (n * (2.0f * kLn2Lo) + v);
  const V d = (((t + 0x1.2ae0fp+3f) * t + 0x1.431b4p+5f) * t + 0x1.74aeb2p+6f) * t + 0x1.95478ep+6f;
  const V e = ((t * 0x1.3fd718p+1f + 0x1.797fb2p+4f) * t + 0x1.7835fcp+6f) * t + 0x1.95478ep+7f;
  const V td = t * d;
  const V q = td / (td * 0x1.40d95ap+1f + e);
  const V s = (((((r * 0x1.6882fap-16f + -0x1.123f3ap-12f) * r + 0x1.555acp-9f) * r
      + -0x1.55548ap-6f) * r + 0x1.fffffap-4f) * r + -0.5f) * r;
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
