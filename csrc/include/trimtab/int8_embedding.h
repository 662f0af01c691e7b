/* int8_embedding: rows of an int8 table with one scale a row, dequantized on the way out.
 *
 *   out[i,d] = round(float(weight[index[i], d]) * scale[index[i]])       one fp32 x, one rounding
 */
#ifndef TRIMTAB_INT8_EMBEDDING_H_
#define TRIMTAB_INT8_EMBEDDING_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct tt_int8_table {
  const int8_t* weight; /* [rows, columns], contiguous */
  const float* scale;   /* [rows] */
  int64_t rows, columns;
} tt_int8_table;

/* Indices [count], contiguous, each of index_size bytes: 4 (int32) or 8 (int64).
 * An index outside [0, rows) is TT_INVALID_ARGUMENT, before anything is written.
 * out [count, columns] of out_dtype, contiguous */
TT_API tt_status tt_int8_embedding(const tt_int8_table* table, const void* indices,
                                   int32_t index_size, int64_t count, void* out, tt_dtype out_dtype,
                                   const tt_parallel* parallel);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_EMBEDDING_H_ */
