// What csrc/cuda uses of the CUDA driver's header, on the SIMT machine: the tensor map, opaque to
// kernels. tests/simt/sm90.h knows what is in it.
#pragma once
#include <cstdint>

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};
