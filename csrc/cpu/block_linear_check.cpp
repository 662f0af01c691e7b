#include "cpu/block_linear_check.h"

#include "cpu/int8_product.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

tt_status check_rows(const char* op, const tt_block_weight& w, int64_t rows) {
  for (int64_t row = 0; row <= rows; ++row) {
    const int64_t low = row == 0 ? 0 : w.crow[row - 1];
    const int64_t high = row == 0 ? 0 : w.blocks;
    const bool last = row == rows && row > 0;
    if (w.crow[row] >= low && w.crow[row] <= high && (!last || w.crow[row] == w.blocks)) continue;
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected crow to rise from 0 to the %lld blocks, got crow[%lld] = %d", op,
                     (long long)w.blocks, (long long)row, w.crow[row]);
  }
  return TT_OK;
}

tt_status check_columns(const char* op, const tt_block_weight& w, int64_t columns) {
  // The sign bit of any of these says that a column is out of range: a loop without branches.
  const int32_t last = int32_t(columns < INT32_MAX ? columns : INT32_MAX) - 1;
  int32_t wild = 0;
  for (int64_t b = 0; b < w.blocks; ++b)
    wild |= w.col[b] | int32_t(uint32_t(last) - uint32_t(w.col[b]));
  if (wild >= 0) return TT_OK;
  int64_t b = 0;
  while (w.col[b] >= 0 && w.col[b] <= last) ++b;
  return set_error(TT_INVALID_ARGUMENT, "%s: expected col in [0, %lld), got col[%lld] = %d", op,
                   (long long)columns, (long long)b, w.col[b]);
}

}  // namespace

tt_status check_block_weight(const char* op, const tt_block_weight* weight, int64_t M,
                             bool values) {
  if (weight == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: weight is NULL", op);
  const tt_block_weight& w = *weight;
  if (M < 0 || w.N < 0 || w.K < 0 || w.blocks < 0 || w.blocks > INT32_MAX || w.bn < 1 || w.bk < 1) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected sizes >= 0 and blocks of at least 1 x 1, got M=%lld N=%lld "
                     "K=%lld, %lld blocks of %lld x %lld",
                     op, (long long)M, (long long)w.N, (long long)w.K, (long long)w.blocks,
                     (long long)w.bn, (long long)w.bk);
  }
  if (w.dtype != TT_I8 && dtype_size(w.dtype) == 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected values of float32, bfloat16, float16 or int8", op);
  }
  if (w.dtype == TT_I8 && w.K > TT_INT8_MAX_K) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected K <= %d, where the int32 sum is exact, got K=%lld", op,
                     TT_INT8_MAX_K, (long long)w.K);
  }
  if (w.crow == nullptr || (w.blocks > 0 && (w.col == nullptr || (values && !w.values)))) {
    return set_error(TT_INVALID_ARGUMENT, "%s: values, crow or col is NULL", op);
  }
  const int64_t rows = (w.N + w.bn - 1) / w.bn, columns = (w.K + w.bk - 1) / w.bk;
  if (rows == 0 && w.blocks > 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected no blocks for N=0, got %lld", op,
                     (long long)w.blocks);
  }
  const tt_status status = check_rows(op, w, rows);
  return status != TT_OK ? status : check_columns(op, w, columns);
}

tt_status check_block_input(const char* op, const void* x, tt_dtype x_dtype,
                            const tt_block_weight& weight, int64_t M) {
  if (dtype_size(x_dtype) == 0 || (x == nullptr && M > 0 && weight.K > 0)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, not NULL", op);
  }
  if (weight.dtype != TT_I8 && weight.dtype != x_dtype)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected x and float values of one dtype", op);
  return TT_OK;
}

}  // namespace trimtab
