// Quantization's formulas: from what was found in a row or a group to its factors, and from there to
// codes and back (NUMERICS.md section 2).
#pragma once
#include "dtypes.h"
#include "f32x1.h"

namespace trimtab {
namespace {

struct RowScale {
  float scale;  // absmax / 127; 0 for a row of zeros, NaN for one with NaN or Inf
  float inverse;  // 127 / absmax; 0 where q = 0 for the whole row
};

// absmax: the row's largest bit pattern of |x|, so that a NaN has survived the reduction.
//
// No clamp is needed after rne(x * inverse): both roundings together err by less than 2^-22 of 127,
// so |x * inverse| < 127.5.
TT_INLINE RowScale row_scale(float absmax) {
  if (float_bits(absmax) >= 0x7f800000u) return {float_from_bits(0x7fc00000u), 0.0f};
  if (absmax == 0.0f) return {0.0f, 0.0f};
  const float inverse = (F32x1(127.0f) / F32x1(absmax)).v;
  if (float_bits(inverse) >= 0x7f800000u)
    return {0.0f, 0.0f};  // absmax below 3.7e-37: r overflowed
  return {(F32x1(absmax) / F32x1(127.0f)).v, inverse};
}

// quantize_affine: b bits with a zero point, one pair a group (NUMERICS.md section 2).
//
//   lo = min(0, min x);  hi = max(0, max x);  range = hi - lo;  levels = 2^b - 1
//   scale = range / levels;  inverse = levels / range;  zero = rne(-lo * inverse)
//   q = min(rne(x * inverse) + zero, levels);  x' = (q - zero) * scale
//
// The range takes in 0, so 0 is stored exactly and a padded element changes nothing.
struct AffineScale {
  float scale;  // range / levels; 0 for a group of zeros, NaN for one with NaN or Inf
  float inverse;  // levels / range; 0 where q = 0 for the whole group
  float zero;  // the code of 0, integral, 0..levels
};

// lo <= 0 <= hi, finite: whether every element is; levels: 2^b - 1, b in 2..8
//
// No clamp of zero is needed: range >= -lo also after rounding, and the product errs by less than
// 2^-20 of levels, so it stays below levels + 1/2.
TT_INLINE AffineScale affine_scale(float lo, float hi, bool finite, float levels) {
  if (!finite) return {float_from_bits(0x7fc00000u), 0.0f, 0.0f};
  F32x1 range = F32x1(hi) - F32x1(lo);
  F32x1 unit(1.0f);  // range stands for range / unit
  if (float_bits(range.v) == 0x7f800000u) {  // hi - lo overflowed: half of it does not
    range = F32x1(hi) * F32x1(0.5f) - F32x1(lo) * F32x1(0.5f);
    unit = F32x1(0.5f);
  }
  if (range.v == 0.0f) return {0.0f, 0.0f, 0.0f};
  const F32x1 inverse = F32x1(levels) / range * unit;
  if (float_bits(inverse.v) == 0x7f800000u) return {0.0f, 0.0f, 0.0f};  // range below 2^-120
  const F32x1 scale = range / F32x1(levels) / unit;
  return {scale.v, inverse.v, rint(-F32x1(lo) * inverse).v};
}

// The clamp acts where hi and -lo both round up half a step. Below 0 nothing can fall: rne is odd, so
// rne(lo * inverse) = -zero.
template <class V>
TT_INLINE V affine_code(V x, V inverse, V zero, V levels) {
  return min(rint(x * inverse) + zero, levels);
}

// q - zero is exact, so the product is the only rounding.
template <class V>
TT_INLINE V affine_value(V q, V zero, V scale) {
  return (q - zero) * scale;
}

}  // namespace
}  // namespace trimtab
