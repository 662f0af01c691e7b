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

}  // namespace
}  // namespace trimtab
