// sparse_store for bf16 without an activation, 32 outputs at a time: sums meet their scales and bias and are
// rounded as they stand, two outputs share a dword, and one transpose serves both. For AVX-512 files; internal linkage.
//
// The same bits as sparse_store's: the same steps a value, before the transpose and not after it.
#pragma once
#include <cstring>

#include "cpu/block_linear.h"
#include "cpu/f32x16.h"

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

// What sparse_store's epilogues do to output n's sums of 16 m, step by step: a_scale is those rows'.
template <bool kInt8>
inline __m512 finished(const SparseOutput& o, const uint32_t* sums, __m512 a_scale, int64_t n) {
  const __m512 bias = _mm512_set1_ps(o.bias[n]);
  if constexpr (!kInt8) return _mm512_add_ps(_mm512_load_ps(sums), bias);
  const __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)),
                                 _mm512_set1_ps(kInt8 ? o.b_scale[n] : 1.0f));
  return _mm512_add_ps(_mm512_mul_ps(t, a_scale), bias);
}

// sums [32 n][16 m], rows `stride` dwords apart -> out[m .. m + rows, n .. n + 32); out_stride even, and for
// int8 16 readable a_scale from m on
template <bool kInt8>
inline void store_bf16_pairs(const SparseOutput& o, const uint32_t* sums, int64_t stride, int64_t m,
                             int rows, int64_t n) {
  alignas(64) uint32_t pairs[16 * kSparseM];
  const __m512 a_scale = kInt8 ? _mm512_loadu_ps(o.a_scale + m) : _mm512_setzero_ps();
  for (int i = 0; i < 16; ++i) {
    const uint32_t* low = sums + 2 * i * stride;
    const __m512i a = round_to_upper(finished<kInt8>(o, low, a_scale, n + 2 * i));
    const __m512i b = round_to_upper(finished<kInt8>(o, low + stride, a_scale, n + 2 * i + 1));
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

// store_group by pairs of outputs, where the call and the group allow it.
template <bool kInt8>
void store_group_bf16(const BlockTask& t, const BlockGroup& g, int64_t panel, int panels,
                      const uint32_t* sums, int64_t panel_stride, int64_t stride = kSparseM) {
  if (!t.pairs || g.cols % 32 != 0)
    return store_group(t, g, panel, panels, sums, panel_stride, stride);
  for (int p = 0; p < panels; ++p, sums += panel_stride) {
    const int64_t m = (panel + p) * kSparseM, left = t.rows - m;
    for (int n = 0; n < g.cols; n += 32)
      store_bf16_pairs<kInt8>(*t.out, sums + n * stride, stride, t.m + m,
                              int(left < kSparseM ? left : kSparseM), g.n + n);
  }
}

}  // namespace
}  // namespace trimtab
