// The kernels of optim_memory.h for this CPU, and 8-bit states to and from fp32 for callers.
#include "cpu/optim_memory.h"

#include "cpu/isa.h"
#include "cpu/optim_kernels.h"
#include "cpu/status.h"

#include <algorithm>
#include <cstring>

namespace trimtab {

tt_status optim_memory_kernels(OptimMemoryKernels* out) {
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK) return status;
  *out = isa >= TT_ISA_AVX512   ? optim_memory_avx512()
         : isa == TT_ISA_SCALAR ? optim_memory_scalar()
                                : optim_memory_avx2();
  return TT_OK;
}

namespace {

tt_status check(const char* op, const void* x, const void* codes, const void* scale, int64_t n) {
  if (n < 0) return set_error(TT_INVALID_ARGUMENT, "%s: expected n >= 0", op);
  if (n > 0 && (!x || !codes || !scale)) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected arrays, got NULL", op);
  }
  return TT_OK;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_optim_encode(const float* x, int64_t n, int32_t is_signed, uint8_t* codes,
                          float* scale) {
  tt_status status = check("optim_encode", x, codes, scale, n);
  OptimMemoryKernels kernels;
  if (status == TT_OK) status = optim_memory_kernels(&kernels);
  if (status != TT_OK) return status;
  alignas(64) float buffer[kOptimBlock];
  for (int64_t i = 0; i < n; i += kOptimBlock) {
    const int64_t count = std::min(n - i, kOptimBlock);
    std::memcpy(buffer, x + i, size_t(count) * sizeof(float));
    kernels.encode(buffer, is_signed != 0, nullptr, i, codes + i, scale + i / kDynamicBlock, count);
  }
  return TT_OK;
}

tt_status tt_optim_decode(const uint8_t* codes, const float* scale, int64_t n, int32_t is_signed,
                          float* x) {
  tt_status status = check("optim_decode", x, codes, scale, n);
  OptimMemoryKernels kernels;
  if (status == TT_OK) status = optim_memory_kernels(&kernels);
  if (status != TT_OK) return status;
  kernels.decode(codes, scale, is_signed != 0, x, n);
  return TT_OK;
}
