#include "cpu/f32x16.h"

namespace trimtab {
namespace {

// Pairs, then pairs of pairs, within 128-bit lanes; then lanes, in two steps: 64 shuffles.
void transpose_16x16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i row[16], other[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // row[i + j] holds columns j, j + 4, j + 8, j + 12 of 4 rows
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
    }
  }
  for (int j = 0; j < 4; ++j) {
    for (int half = 0; half < 2; ++half) {  // columns j and j + 8, j + 4 and j + 12 of 8 rows
      const __m512i upper = row[8 * half + j], lower = row[8 * half + 4 + j];
      other[4 * half + j] = _mm512_shuffle_i32x4(upper, lower, 0x88);
      other[8 + 4 * half + j] = _mm512_shuffle_i32x4(upper, lower, 0xdd);
    }
    for (int set = 0; set < 2; ++set) {
      const __m512i upper = other[8 * set + j], lower = other[8 * set + 4 + j];
      uint32_t* column = to + (j + 4 * set) * to_stride;
      _mm512_storeu_si512(column, _mm512_shuffle_i32x4(upper, lower, 0x88));
      _mm512_storeu_si512(column + 8 * to_stride, _mm512_shuffle_i32x4(upper, lower, 0xdd));
    }
  }
}

}  // namespace
}  // namespace trimtab

#include "cpu/sparse_panel_lanes.h"

namespace trimtab {
namespace {

WeightEpilogueFn float_epilogue(tt_activation activation, tt_dtype out_dtype) {
  return kWeightAvx512.epilogue(activation, out_dtype);
}

}  // namespace

const SparseLanes kSparseAvx512 = {fill_sparse_panel<F32x16>, fill_part<F32x16>,
                                   all_finite<F32x16>,        transpose_dwords,
                                   int8_epilogue_avx512,      float_epilogue};

}  // namespace trimtab
