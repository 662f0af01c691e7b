// packed[n / 16][k / 4][n % 16][k % 4], zeros beyond N and K, TT_INT8_PACK_TAIL zero bytes at the end.
#include <trimtab/int8_pack.h>

#include <cstring>

#include "cpu/int8_kernels.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

tt_status check(const char* op, const int8_t* b, int64_t b_stride, int64_t N, int64_t K,
                const int8_t* packed) {
  if (N < 0 || K < 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got N=%lld K=%lld", op,
                     (long long)N, (long long)K);
  }
  if (packed == nullptr || reinterpret_cast<uintptr_t>(packed) % TT_INT8_PACK_ALIGNMENT != 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected packed aligned to %d bytes, got %p", op,
                     TT_INT8_PACK_ALIGNMENT, static_cast<const void*>(packed));
  }
  if (N > 0 && K > 0 && (b == nullptr || (N > 1 && b_stride < K))) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected b with row stride >= K=%lld, got %p, %lld",
                     op, (long long)K, static_cast<const void*>(b), (long long)b_stride);
  }
  return TT_OK;
}

constexpr int64_t kParallelBytes = 256 << 10;  // 50 us of copying

int64_t panel_count(int64_t N) { return round_up(N, kPanelN) / kPanelN; }

// Copies one panel in either direction; `packed` to or from 16 rows of b.
template <bool kPack, class Packed, class Plain>
void copy_panel(Packed* packed, Plain* b, int64_t b_stride, int64_t rows, int64_t K) {
  for (int64_t row = 0; row < rows; ++row) {
    Packed* cell = packed + row * 4;
    Plain* plain = b + row * b_stride;
    int64_t k = 0;
    for (; k + 4 <= K; k += 4, cell += kPanelN * 4) {
      if constexpr (kPack) std::memcpy(cell, plain + k, 4);
      else std::memcpy(plain + k, cell, 4);
    }
    for (; k < K; ++k) {
      if constexpr (kPack) cell[k % 4] = plain[k];
      else plain[k] = cell[k % 4];
    }
  }
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_int8_packed_size(int64_t N, int64_t K) {
  return panel_count(N) * packed_panel_bytes(K) + TT_INT8_PACK_TAIL;
}

tt_status tt_int8_pack(const int8_t* b, int64_t b_stride, int64_t N, int64_t K, int8_t* packed,
                       const tt_parallel* parallel) {
  const tt_status status = check("int8_pack", b, b_stride, N, K, packed);
  if (status != TT_OK) return status;
  const int64_t bytes = packed_panel_bytes(K);
  const tt_parallel pool = pool_or_serial(parallel, N * K > kParallelBytes);
  parallel_run(pool, panel_count(N), [&](int64_t p) {
    const int64_t rows = N - p * kPanelN < kPanelN ? N - p * kPanelN : kPanelN;
    if (rows < kPanelN || K % 4 != 0) std::memset(packed + p * bytes, 0, size_t(bytes));
    copy_panel<true>(packed + p * bytes, b + p * kPanelN * b_stride, b_stride, rows, K);
  });
  std::memset(packed + panel_count(N) * bytes, 0, TT_INT8_PACK_TAIL);
  return TT_OK;
}

tt_status tt_int8_unpack(const int8_t* packed, int64_t N, int64_t K, int8_t* b, int64_t b_stride,
                         const tt_parallel* parallel) {
  const tt_status status = check("int8_unpack", b, b_stride, N, K, packed);
  if (status != TT_OK) return status;
  const int64_t bytes = packed_panel_bytes(K);
  const tt_parallel pool = pool_or_serial(parallel, N * K > kParallelBytes);
  parallel_run(pool, panel_count(N), [&](int64_t p) {
    const int64_t rows = N - p * kPanelN < kPanelN ? N - p * kPanelN : kPanelN;
    copy_panel<false>(packed + p * bytes, b + p * kPanelN * b_stride, b_stride, rows, K);
  });
  return TT_OK;
}
