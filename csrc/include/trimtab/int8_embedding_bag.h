/* int8_embedding_bag: sums or means of rows of an int8 table.
 *
 *   acc = +0;  for each index i of the bag in order, padding_index left out:
 *       t = float(weight[i,d]) * scale[i];  t = t * per_sample_weight (if there is one);  acc = acc + t
 *   sum:  out[b,d] = round(acc)           mean: out[b,d] = round(acc / float(rows that were added))
 *   A bag that adds no row gives +0.
 */
#ifndef TRIMTAB_INT8_EMBEDDING_BAG_H_
#define TRIMTAB_INT8_EMBEDDING_BAG_H_
#include <trimtab/int8_embedding.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef enum tt_bag_mode { TT_BAG_SUM = 0, TT_BAG_MEAN = 1 } tt_bag_mode;

typedef struct tt_bags {
  const void* indices;  /* [count], contiguous, index_size bytes each: 4 or 8 */
  const void*
      offsets;  /* [offset_count] of the same type: where each bag begins; the first is 0, none
                         * falls. NULL: bags of count / bags indices each */
  int32_t index_size;
  int64_t count;
  int64_t bags;
  int64_t offset_count;           /* bags, or bags + 1: the last one ends the last bag */
  int64_t padding_index;          /* this row is left out; -1: none is */
  const float* per_sample_weight; /* [count], or NULL; mode sum only */
  tt_bag_mode mode;
} tt_bags;

/* out [bags, columns] of out_dtype, contiguous. A bad index or offset is TT_INVALID_ARGUMENT, before
 * anything is written. */
TT_API tt_status tt_int8_embedding_bag(const tt_int8_table* table, const tt_bags* bags, void* out,
                                       tt_dtype out_dtype, const tt_parallel* parallel);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_EMBEDDING_BAG_H_ */
