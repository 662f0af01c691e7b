#include "cpu/f32x8.h"

namespace trimtab {
namespace {

// Pairs, then pairs of pairs, within 128-bit lanes; the last step swaps lanes.
TT_INLINE void transpose_8x8(const uint32_t* from, int64_t from_stride, uint32_t* to,
                             int64_t to_stride) {
  __m256i row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i)
    row[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride));
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm256_unpacklo_epi64(pair[i + j], pair[i + 2 + j]);
      four[i + 2 * j + 1] = _mm256_unpackhi_epi64(pair[i + j], pair[i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * to_stride),
                        _mm256_permute2x128_si256(four[i], four[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (i + 4) * to_stride),
                        _mm256_permute2x128_si256(four[i], four[i + 4], 0x31));
  }
}

void transpose_16x16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  for (int row = 0; row < 16; row += 8)
    for (int col = 0; col < 16; col += 8)
      transpose_8x8(from + row * from_stride + col, from_stride, to + col * to_stride + row,
                    to_stride);
}

}  // namespace
}  // namespace trimtab

#include "cpu/sparse_panel_lanes.h"

namespace trimtab {
namespace {

WeightEpilogueFn float_epilogue(tt_activation activation, tt_dtype out_dtype) {
  return kWeightAvx2.epilogue(activation, out_dtype);
}

}  // namespace

const SparseLanes kSparseAvx2 = {fill_sparse_panel<F32x8>, fill_part<F32x8>,   all_finite<F32x8>,
                                 transpose_dwords,         int8_epilogue_avx2, float_epilogue};

}  // namespace trimtab
