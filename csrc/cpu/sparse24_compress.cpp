// sparse24_compress: rows over threads, a row by the instruction set's kernel.
#include <trimtab/sparse24_compress.h>

#include <algorithm>
#include <atomic>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sparse24_compress.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

int64_t size_of(tt_dtype dtype) {
  switch (dtype) {
    case TT_F32: return 4;
    case TT_BF16:
    case TT_F16: return 2;
    case TT_I8: return 1;
    default: return 0;
  }
}

Sparse24RowFn row_of(tt_isa isa) {
  if (isa >= TT_ISA_AVX512 && has_avx512_vbmi2()) return sparse24_row_avx512;
  return isa == TT_ISA_SCALAR ? sparse24_row_scalar : sparse24_row_avx2;
}

// The first NaN of a row; K if there is none.
int64_t find_nan(const void* row, tt_dtype dtype, int64_t K) {
  int64_t k = 0;
  const auto bits = [&] {
    return dtype == TT_F32    ? score24(static_cast<const float*>(row)[k]) > Score24<float>::kInf
           : dtype == TT_BF16 ? score24(static_cast<const bf16*>(row)[k]) > Score24<bf16>::kInf
                              : score24(static_cast<const fp16*>(row)[k]) > Score24<fp16>::kInf;
  };
  while (k < K && !bits()) ++k;
  return k;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_sparse24_compress(const void* weight, tt_dtype dtype, int64_t stride, int64_t N,
                               int64_t K, void* values, uint8_t* indices,
                               const tt_parallel* parallel) {
  constexpr const char* kOp = "sparse24_compress";
  const int64_t size = size_of(dtype);
  if (size == 0)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a weight of float32, bfloat16, float16 or int8, got dtype %d",
                     kOp, int(dtype));
  if (N < 0 || K < 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got N=%lld K=%lld", kOp,
                     (long long)N, (long long)K);
  if (N == 0 || K == 0) return TT_OK;
  if (weight == nullptr || values == nullptr || indices == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: weight, values or indices is NULL", kOp);
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK) return status;
  const Sparse24RowFn row = row_of(isa);
  const int64_t groups = (K + 3) / 4, bytes = (groups + 1) / 2;
  const char* from = static_cast<const char*>(weight);
  char* to = static_cast<char*>(values);
  // A task is about 256 KB of weight: 20 us from memory, several times what waking a thread costs.
  const int64_t rows_a_task = std::max<int64_t>(1, (256 * 1024) / (K * size));
  std::atomic<int64_t> unsound{N};
  parallel_run(pool_or_serial(parallel), (N + rows_a_task - 1) / rows_a_task, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * rows_a_task, N);
    for (int64_t n = task * rows_a_task; n < end; ++n) {
      if (row(from + n * stride * size, dtype, K, to + n * groups * 2 * size, indices + n * bytes))
        continue;
      int64_t first = unsound.load(std::memory_order_relaxed);
      while (n < first && !unsound.compare_exchange_weak(first, n)) {
      }
    }
  });
  const int64_t n = unsound.load();
  if (n == N) return TT_OK;
  return set_error(TT_INVALID_ARGUMENT,
                   "%s: expected a weight without NaN, got one at [%lld, %lld]", kOp, (long long)n,
                   (long long)find_nan(from + n * stride * size, dtype, K));
}
