// int8_embedding: rows over threads, a row by the instruction set's loop.
#include <trimtab/int8_embedding.h>

#include <algorithm>

#include "cpu/int8_embedding.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace trimtab {

tt_status check_embedding(const char* op, const tt_int8_table* table, const void* indices,
                          int32_t index_size, int64_t count, tt_dtype out_dtype) {
  if (table == nullptr || table->rows < 0 || table->columns < 0 || count < 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a table and sizes >= 0", op);
  }
  if (index_size != 4 && index_size != 8) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected indices of int32 or int64, got %d bytes",
                     op, index_size);
  }
  if (dtype_size(out_dtype) == 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected out of float32, bfloat16 or float16, got dtype %d", op,
                     out_dtype);
  }
  if (count > 0 && (indices == nullptr ||
                    (table->rows > 0 && (table->scale == nullptr ||
                                         (table->weight == nullptr && table->columns > 0))))) {
    return set_error(TT_INVALID_ARGUMENT, "%s: weight, scale or indices is NULL", op);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = index_at(indices, index_size, i);
    if (index < 0 || index >= table->rows) {
      return set_error(TT_INVALID_ARGUMENT,
                       "%s: expected indices in [0, %lld), the rows of the table, got %lld at "
                       "position %lld",
                       op, (long long)table->rows, (long long)index, (long long)i);
    }
  }
  return TT_OK;
}

namespace {

// Rows lie anywhere in the table, so the hardware cannot foresee them; the indices tell.
constexpr int64_t kRowsAhead = 8;

void prefetch_row(const tt_int8_table& table, int64_t index) {
  const int8_t* row = table.weight + index * table.columns;
  const int64_t bytes = std::min<int64_t>(table.columns, 1024);  // the hardware follows from there
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  __builtin_prefetch(table.scale + index);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_embedding(const tt_int8_table* table, const void* indices, int32_t index_size,
                            int64_t count, void* out, tt_dtype out_dtype,
                            const tt_parallel* parallel) {
  tt_status status =
      check_embedding("int8_embedding", table, indices, index_size, count, out_dtype);
  tt_isa isa;
  if (status == TT_OK) status = current_isa(&isa);
  if (status != TT_OK) return status;
  const int64_t D = table->columns;
  if (count > 0 && D > 0 && out == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "int8_embedding: out is NULL");
  }
  const EmbeddingLanes& lanes = embedding_lanes(isa);
  const int64_t row_bytes = D * dtype_size(out_dtype);
  // A task is about 32 K elements, 10 us: several times what waking a thread costs.
  const int64_t rows = std::max<int64_t>(32768 / std::max<int64_t>(D, 1), 1);
  const tt_parallel pool = pool_or_serial(parallel);
  parallel_run(pool, (count + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * rows, count);
    for (int64_t i = task * rows; i < end; ++i) {
      if (i + kRowsAhead < end) prefetch_row(*table, index_at(indices, index_size, i + kRowsAhead));
      const int64_t index = index_at(indices, index_size, i);
      lanes.dequantize(table->weight + index * D, table->scale[index], D,
                       static_cast<char*>(out) + i * row_bytes, out_dtype);
    }
  });
  return TT_OK;
}
