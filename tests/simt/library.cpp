// The host side of csrc/cuda/launch.cuh on the SIMT machine, and its C interface for tests.
#include "cuda/launch.cuh"
#include "simt/tensor_map.h"

namespace trimtab {

tt_status device_facts(const char* op, DeviceFacts* facts) {
  const simt::Machine& m = simt::machine;
  if (m.arch < 80)
    return set_error(TT_UNSUPPORTED,
                     "%s: expected a GPU of compute capability 8.0 or later, got %d.%d", op,
                     m.arch / 10, m.arch % 10);
  *facts = {m.arch, m.sm_count, simt::shared_limit(m.arch)};
  return TT_OK;
}

tt_status make_tensor_map(const char* op, CUtensorMap* map, const void* data, int64_t rows,
                          int64_t columns, int64_t stride, int box_rows, int box_bytes) {
  return simt::make_tensor_map(op, map, data, rows, columns, stride, box_rows, box_bytes);
}

}  // namespace trimtab

extern "C" {

// Kernels may touch these bytes, and only bytes that were registered.
TT_API void simt_register(const void* p, int64_t bytes, int writable) {
  simt::machine.ranges.add(p, bytes, writable != 0);
}

TT_API void simt_clear(void) { simt::machine.ranges.clear(); }

// policy: 0 late, 1 random, 2 early, -1 drawn by the seed for each launch
TT_API void simt_configure(uint64_t seed, int arch, int sm_count, int policy) {
  simt::machine.seed = seed;
  simt::machine.arch = arch;
  simt::machine.sm_count = sm_count;
  simt::machine.policy = policy;
  simt::machine.launches = 0;
}

TT_API void simt_mutate(int mutant) { simt::machine.mutant = mutant; }

// Launches since the last simt_configure.
TT_API int64_t simt_launches(void) { return int64_t(simt::machine.launches); }
}
