// What follows the int32 sum of an int8 product (NUMERICS.md section 3), for one lane or many.
#pragma once
#include "activation.h"

namespace trimtab {
namespace {

// t = float(acc);  t * b_scale * a_scale + bias, in that order, each step rounded;  act(t)
template <Activation kActivation, class V>
TT_INLINE V epilogue(V acc, V a_scale, V b_scale, V bias) {
  return activate<kActivation>(acc * b_scale * a_scale + bias);
}

// The code of t for a next layer whose scale is 1 / inverse, still to be rounded by store_int8:
// clamp(t * inverse, -127, 127), and 0 for NaN. Clamped first: rne leaves +-127 where they are.
template <class V>
TT_INLINE V int8_code(V t, V inverse) {
  const V code = min(max(t * inverse, V(-127.0f)), V(127.0f));
  return select(is_nan(t * inverse), V(0.0f), code);
}

}  // namespace
}  // namespace trimtab
