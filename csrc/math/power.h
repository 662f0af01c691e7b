// Powers in double that are the same on the host and on a GPU, whose own pow differ in the last bits.
//
// Computed in pairs of doubles, to some 95 bits, and rounded once: the nearest double, but for cases that
// come up once in 2^40. A C library's pow errs by less than an ulp, so that the constants made of either,
// cast to fp32, are the same (tests/test_optim_power.py).
#pragma once
#include <cmath>

#include "dtypes.h"

namespace trimtab {
namespace {

// high + low, where low is at most half an ulp of high
struct Double2 {
  double high, low;
};

// a + b where |a| >= |b| or a is 0: the rounded sum and what it lost.
TT_INLINE Double2 fast_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

TT_INLINE Double2 add(Double2 a, double b) {
  const double sum = a.high + b, part = sum - a.high;
  const double lost = (a.high - (sum - part)) + (b - part);
  return fast_sum(sum, lost + a.low);
}

TT_INLINE Double2 multiply(Double2 a, Double2 b) {
  const double product = a.high * b.high;
  const double lost = ::fma(a.high, b.high, -product);
  return fast_sum(product, lost + (a.high * b.low + a.low * b.high));
}

// x^n for 0 <= x <= 1 and a count n of steps.
TT_INLINE double power(double x, double n) {
  Double2 result = {1.0, 0.0}, square = {x, 0.0};
  for (uint64_t left = uint64_t(n); left != 0; left >>= 1) {
    if (left & 1) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result.high + result.low;
}

// e^t for t <= 0: 2^k (e^(r / 256))^256, |r| <= log(2) / 2.
TT_INLINE Double2 exponential(Double2 t) {
  // log(2) in two parts, the first of 32 bits, so that k times it is exact
  constexpr double kLog2High = 0x1.62e42feep-1, kLog2Low = 0x1.a39ef35793c76p-33;
  if (!(t.high >= -700.0)) return {t.high < -700.0 ? 0.0 : t.high, 0.0};  // 2^k would not be normal
  const double k = ::rint(t.high * 1.4426950408889634);
  Double2 r = add({t.high - k * kLog2High, t.low}, -(k * kLog2Low));
  r = {r.high * 0x1p-8, r.low * 0x1p-8};
  // 1 + r (1 + r/2 (1 + r/3 (...))) to r^8 / 8!: the next term is below 2^-103.
  constexpr double kInverse[][2] = {{0x1p-3, 0.0},
                                    {0x1.2492492492492p-3, 0x1.2492492492492p-57},
                                    {0x1.5555555555555p-3, 0x1.5555555555555p-57},
                                    {0x1.999999999999ap-3, -0x1.999999999999ap-57},
                                    {0x1p-2, 0.0},
                                    {0x1.5555555555555p-2, 0x1.5555555555555p-56},
                                    {0x1p-1, 0.0},
                                    {1.0, 0.0}};
  Double2 sum = {1.0, 0.0};
  for (int i = 0; i < 8; ++i) {
    sum = multiply(multiply(sum, r), {kInverse[i][0], kInverse[i][1]});
    sum = add(sum, 1.0);
  }
  for (int i = 0; i < 8; ++i) sum = multiply(sum, sum);
  const uint64_t exponent = uint64_t(int64_t(k) + 1023) << 52;
  double scale;
#if defined(__CUDA_ARCH__)
  scale = __longlong_as_double(int64_t(exponent));
#else
  std::memcpy(&scale, &exponent, sizeof scale);
#endif
  return {sum.high * scale, sum.low * scale};
}

// 0.96^y for y >= 0, NAdam's.
TT_INLINE double power_of_096(double y) {
  const Double2 log_096 = {-0x1.4e69ed6d80eb3p-5, -0x1.067d54cb9a84cp-60};  // of the double 0.96
  const Double2 power = exponential(multiply({y, 0.0}, log_096));
  return power.high + power.low;
}

// n^y for a count n >= 1 of steps and y <= 0, Adafactor's. A step of Newton's takes log(n) of the C library
// or the GPU, right to some ulp, to twice as many digits: log(n) = l + log(1 + d), n e^-l = 1 + d.
TT_INLINE double power_of_count(double n, double y) {
  const double guess = ::log(n);
  const Double2 one = multiply({n, 0.0}, exponential({-guess, 0.0}));
  const double d = (one.high - 1.0) + one.low;
  const Double2 power = exponential(multiply({y, 0.0}, fast_sum(guess, d - 0.5 * d * d)));
  return power.high + power.low;
}

}  // namespace
}  // namespace trimtab
