// The order in which the norm of all gradients, and LAMB's and Adafactor's of a tensor, is added up on every
// device (csrc/cpu/optim_lanes.h and csrc/cuda/optim_prepare.cuh have the partial sums).
#pragma once
#include <cstdint>

namespace trimtab {
namespace {

constexpr int64_t kNormBlock = 4096;  // elements of a tensor in one partial sum
// Running sums of the partial sums: partial sum k goes into sum k % 256; then these by halves, sum i
// and sum i + 128, 64, ... 1. A block of threads does the same.
constexpr int kNormSums = 256;

// The sum of at(0) ... at(n - 1), none of them negative, in that order, on a host.
template <class At>
inline double add_up(int64_t n, At&& at) {
  double sums[kNormSums];
  int64_t used = n < kNormSums ? n : kNormSums;
  for (int64_t k = 0; k < used; ++k) sums[k] = at(k);
  for (int64_t k = used; k < n; ++k) sums[k % kNormSums] += at(k);
  for (int64_t half = kNormSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i + half < used; ++i) sums[i] += sums[i + half];
    used = used < half ? used : half;
  }
  return used > 0 ? sums[0] : 0.0;
}

}  // namespace
}  // namespace trimtab
