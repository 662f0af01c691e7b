/* sparse24_compress: a weight [N, K] pruned to 2:4 and compressed in one pass.
 *
 * Of every four adjacent weights of a row the two largest |w| stay; of equal ones the lower index, and -0 is 0
 * (NUMERICS.md section 5). K is padded to K4, a multiple of 4, with zeros.
 *
 *   values  [N, K4 / 2] of weight's dtype: the kept weights in their order
 *   indices [N, ceil(K4 / 8)]: four bits a group of four, an even group's in the low half of a byte: the
 *           position of its first kept weight in the lower two bits, that of the second, which is greater, above
 */
#ifndef TRIMTAB_SPARSE24_COMPRESS_H_
#define TRIMTAB_SPARSE24_COMPRESS_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

/* weight: TT_F32, TT_BF16, TT_F16 or TT_I8, rows `stride` elements apart. values and indices: rows one behind
 * the other. A NaN is TT_INVALID_ARGUMENT, and the message says where. */
TT_API tt_status tt_sparse24_compress(const void* weight, tt_dtype dtype, int64_t stride, int64_t N,
                                      int64_t K, void* values, uint8_t* indices,
                                      const tt_parallel* parallel);

/* What the CUDA kernel writes; for the transposed weight read N for K and K for N. */
typedef struct tt_sparse24_compressed {
  void*
      values; /* in rows of row_bytes, a multiple of 16 and at least those of K4 / 2 elements: what is
                 * beyond them becomes zero; aligned to 16 */
  int64_t row_bytes;
  uint8_t* indices; /* as above; or NULL */
  uint32_t*
      metadata; /* as tt_sparse24_weight has it (sparse24_linear.h); or NULL, and for TT_F32 */
} tt_sparse24_compressed;

/* `out` of the weight, and of its transpose too unless `transposed` is NULL: [K, N] pruned along N, in the same
 * pass over the weight. A NaN is larger than every number, so it stays and is seen. One launch. */
TT_API tt_status tt_sparse24_compress_cuda(const void* weight, tt_dtype dtype, int64_t stride,
                                           int64_t N, int64_t K, const tt_sparse24_compressed* out,
                                           const tt_sparse24_compressed* transposed,
                                           tt_stream stream);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_SPARSE24_COMPRESS_H_ */
