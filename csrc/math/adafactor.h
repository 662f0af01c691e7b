// Adafactor as torch.optim.Adafactor has it (Shazeer and Stern 2018, arXiv:1804.04235). Of a matrix [m, n]:
//
//   row_var = lerp(row_var, sum_j g^2 / n, w);   col_var = lerp(col_var, sum_i g^2 / m, w)
//   V = row_var col_var / max(mean(row_var), eps1)                     w = t^beta2_decay
//   u = g / sqrt(max(V, eps1^2))
//   p = p * (1 - lr * weight_decay)
//   p = p - max(eps2, |p| / sqrt(mn)) * min(lr, 1 / sqrt(t)) / max(1, |u| / (sqrt(mn) * d)) * u
//
// where |p| is that before the decay; of a vector V = variance = lerp(variance, g^2, w).
//
// 1 / sqrt(max(V, eps1^2)) = min(1 / sqrt(row_var / mean) * 1 / sqrt(col_var), 1 / eps1): one number a row and
// one a column, computed in double and rounded once, so that an element costs two products and no
// division or root. It also has no V that underflows: with an eps1 of 1e-30, whose square does, torch's step
// is NaN where a row's gradients are all 0, and this one is 0.
#pragma once
#include <cmath>

#include "optim_rule.h"

namespace trimtab {
struct AdafactorConstants {
  double weight;  // w
  float limit;  // 1 / eps1, but finite: no gradient is no step, whatever V
  float decay;  // 1 - lr * weight_decay
  float rate;  // what the direction is multiplied by, negative
};

namespace {

// The order of the sums, on every device (csrc/cpu/adafactor_lanes.h, csrc/cuda/adafactor.cuh):
//
//   row_var     512 columns of a row in 32 lanes of fp32, column c in lane c % 32, these in double: lanes 4 k
//               + i in sum i, (0 + 1) + (2 + 3); the results of a tile's columns in order, then the tiles'
//   col_var     kTileRows rows of a column in fp32; these sums in double, number k in chain k %
//               kColumnChains, then by halves as in math/norm.h
//   mean        of kMeanRows rows in double, in the order of math/norm.h, and these likewise
//   |p|, |u|    512 elements as those of a row, eight such in order, and these in the order of math/norm.h
//
// A column of a tile is at most 64 fp32 squares: its sum errs by less than 2^-18. 64 rows also keep what a
// pass writes in sums of columns at a 64th of what it reads.
constexpr int64_t kTileRows = 64, kTileColumns = 4096;
constexpr int kColumnChains = 8;
constexpr int64_t kMeanRows = 1024;

TT_INLINE AdafactorConstants adafactor_constants(const tt_optim_group& group, double eps1,
                                                 double weight) {
  const double limit = 1.0 / eps1, most = 3.4028234663852886e38;  // of fp32
  return {weight, float(limit < most ? limit : most), float(1.0 - group.lr * group.weight_decay),
          0.0f};
}

// |p|^2 and |u|^2 over the whole tensor.
TT_INLINE float adafactor_rate(double lr, double eps2, double d, double step, double numel,
                               double param_square, double direction_square) {
  const double root = ::sqrt(numel);
  const double size = ::sqrt(param_square) / root;
  const double excess = ::sqrt(direction_square) / (root * d);
  const double length = size > eps2 ? size : eps2;
  const double relative = lr < 1.0 / ::sqrt(step) ? lr : 1.0 / ::sqrt(step);
  return float(-(length * relative) / (excess > 1.0 ? excess : 1.0));
}

// NaN goes through the maximum, as through torch's clamp.
TT_INLINE float adafactor_row_factor(float row_var, double mean, double eps1) {
  return float(1.0 / ::sqrt(double(row_var) / (mean < eps1 ? eps1 : mean)));
}
TT_INLINE float adafactor_column_factor(float col_var) {
  return float(1.0 / ::sqrt(double(col_var)));
}

template <class V>
TT_INLINE V adafactor_direction(V g, V row_factor, V column_factor, V limit) {
  return g * min(limit, row_factor * column_factor);  // a NaN goes through
}

template <class V>
TT_INLINE V adafactor_vector_direction(V g, V variance, V limit) {
  return g * min(limit, V(1.0f) / sqrt(variance));
}

template <class V>
TT_INLINE V adafactor_update(V p, V u, V decay, V rate) {
  return fma(u, rate, p * decay);
}

}  // namespace
}  // namespace trimtab
