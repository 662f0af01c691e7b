// The order in which the norm of all gradients, and LAMB's of a tensor, is added up on every device
// (csrc/cpu/optim_lanes.h and csrc/cuda/optim_prepare.cuh have the partial sums).
#pragma once
#include <cstdint>

namespace trimtab {
namespace {

constexpr int64_t kNormBlock = 4096;  // elements of a tensor in one partial sum
// Running sums of the partial sums: partial sum k goes into sum k % 256; then these by halves, sum i
// and sum i + 128, 64, ... 1. A block of threads does the same.
constexpr int kNormSums = 256;

}  // namespace
}  // namespace trimtab
