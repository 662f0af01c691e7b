// The scalar step of symmetric int8 quantization: from a row's largest magnitude to its two factors
// (NUMERICS.md section 2).
#pragma once
#include "dtypes.h"
#include "f32x1.h"

namespace trimtab {
namespace {

struct RowScale {
  float scale;    // absmax / 127; 0 for a row of zeros, NaN for one with NaN or Inf
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
  if (float_bits(inverse) >= 0x7f800000u) return {0.0f, 0.0f};  // absmax below 3.7e-37: r overflowed
  return {(F32x1(absmax) / F32x1(127.0f)).v, inverse};
}

}  // namespace
}  // namespace trimtab
