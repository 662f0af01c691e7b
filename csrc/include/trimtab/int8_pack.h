/* int8_pack: the one layout in which an int8 weight b [N, K] lives for every CPU kernel.
 *
 *   packed[n / 16][k / 4][n % 16][k % 4],  N padded to 16 and K to 4 with zeros
 *
 * 64 bytes hold 16 columns by 4 steps of K: a row of an AMX tile, an AVX-512 register, two AVX2 ones.
 * TT_INT8_PACK_TAIL zero bytes follow, because the AMX kernel reads K in steps of 64: its last read
 * runs into the next panel (harmless: the activations are zero there) or into this tail.
 */
#ifndef TRIMTAB_INT8_PACK_H_
#define TRIMTAB_INT8_PACK_H_
#include <trimtab/trimtab.h>
#ifdef __cplusplus
extern "C" {
#endif

#define TT_INT8_PACK_TAIL 960      /* 15 groups of 4 by 16 columns */
#define TT_INT8_PACK_ALIGNMENT 64  /* of the packed buffer */

/* Bytes of the packed form of an [N, K] weight. */
TT_API int64_t tt_int8_packed_size(int64_t N, int64_t K);

/* b [N, K] int8, rows b_stride apart -> packed, tt_int8_packed_size(N, K) bytes, 64-byte aligned */
TT_API tt_status tt_int8_pack(const int8_t* b, int64_t b_stride, int64_t N, int64_t K,
                              int8_t* packed, const tt_parallel* parallel);

/* The inverse: packed -> b [N, K] int8, rows b_stride apart */
TT_API tt_status tt_int8_unpack(const int8_t* packed, int64_t N, int64_t K, int8_t* b,
                                int64_t b_stride, const tt_parallel* parallel);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_INT8_PACK_H_ */
