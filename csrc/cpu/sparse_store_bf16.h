// sparse_store for bf16 without an activation, 32 outputs at a time: sums meet the bias and are rounded as they
// stand, two outputs share a dword, and one transpose serves both. For AVX-512 files; internal linkage.
//
// The same bits as sparse_store's: + and one RNE a value, in either order of the transpose.
#pragma once
#include <cstring>

#include "cpu/f32x16.h"
#include "cpu/sparse_epilogue.h"

namespace trimtab {
namespace {

// The upper half of each dword is the value in bf16, to_bf16 of dtypes.h; the lower half is anything.
inline __m512i round_to_upper(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i down = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(kBf16Nan << 16));
}

// sums [32 n][16 m] fp32, rows `stride` apart -> out[m .. m + rows, n .. n + 32); out_stride even
inline void store_bf16_pairs(const SparseOutput& o, const float* sums, int64_t stride, int64_t m,
                             int rows, int64_t n) {
  alignas(64) uint32_t pairs[16 * kSparseM];
  const float* bias = o.bias + n;
  for (int i = 0; i < 16; ++i) {
    const __m512 low = _mm512_load_ps(sums + 2 * i * stride);
    const __m512 high = _mm512_load_ps(sums + (2 * i + 1) * stride);
    const __m512i a = round_to_upper(_mm512_add_ps(low, _mm512_set1_ps(bias[2 * i])));
    const __m512i b = round_to_upper(_mm512_add_ps(high, _mm512_set1_ps(bias[2 * i + 1])));
    _mm512_store_si512(pairs + 16 * i,
                       _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
  }
  char* out = o.out + (m * o.out_stride + n) * 2;
  if (rows == kSparseM) return o.lanes->transpose(pairs, 16, out, o.out_stride / 2);
  alignas(64) uint32_t turned[16 * kSparseM];
  o.lanes->transpose(pairs, 16, turned, 16);
  for (int row = 0; row < rows; ++row)
    std::memcpy(out + row * o.out_stride * 2, turned + 16 * row, 64);
}

}  // namespace
}  // namespace trimtab
