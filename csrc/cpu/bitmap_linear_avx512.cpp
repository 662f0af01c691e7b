// AVX-512. Up to 8 rows of x: dot products along a row of the weight, 16 weights from one vpexpandd (three
// uops of port 5 with its mask, 3 cycles; each row of x adds one fma). More rows: bitmap_walk.h.
#include <immintrin.h>

#include "cpu/bitmap_walk.h"
#include "cpu/f32x16.h"

namespace trimtab {
namespace {

// sums [m] of one row of the weight; x [kRows][x_stride] floats, zeros up to a multiple of 64
template <int kRows>
void dot_row(const uint8_t* bits, int64_t row_bytes, const float* values, const float* x,
             int64_t x_stride, float* sums) {
  __m512 sum[kRows];
  for (int m = 0; m < kRows; ++m) sum[m] = _mm512_setzero_ps();
  for (int64_t byte = 0; byte < row_bytes; byte += 8, x += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(values) + 2112, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      uint16_t mask;
      std::memcpy(&mask, bits + byte + part * 2, 2);
      const __m512 weight = _mm512_maskz_expandloadu_ps(mask, values);
      values += __builtin_popcount(mask);
      for (int m = 0; m < kRows; ++m)
        sum[m] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + m * x_stride + part * 16), sum[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) sums[m] = _mm512_reduce_add_ps(sum[m]);
}

using DotFn = void (*)(const uint8_t*, int64_t, const float*, const float*, int64_t, float*);
constexpr DotFn kDots[kBitmapDotRows] = {dot_row<1>, dot_row<2>, dot_row<3>, dot_row<4>,
                                         dot_row<5>, dot_row<6>, dot_row<7>, dot_row<8>};

}  // namespace

bool bitmap_dots_f32_avx512(const BitmapBlock& s, const SparseOutput& output) {
  alignas(64) float sums[kSparseTileN * kSparseM] = {};
  const float* values = static_cast<const float*>(s.weight.values);
  for (int64_t n = s.n_begin; n < s.n_end; n += kSparseTileN) {
    const int cols = int(s.n_end - n < kSparseTileN ? s.n_end - n : kSparseTileN);
    for (int col = 0; col < cols; ++col)
      kDots[s.rows - 1](s.weight.bits + (n + col) * s.row_bytes, s.row_bytes,
                        values + s.weight.row_start[n + col], static_cast<const float*>(s.x),
                        s.panel_bytes / 4, sums + col * kSparseM);
    sparse_store(output, sums, kSparseM, 0, int(s.rows), n, cols);
  }
  return true;
}

bool bitmap_block_f32_avx512(const BitmapBlock& s, const SparseOutput& output) {
  return walk_block<F32x16, float>(s, output);
}
bool bitmap_block_bf16_avx512(const BitmapBlock& s, const SparseOutput& output) {
  return walk_block<F32x16, bf16>(s, output);
}
bool bitmap_block_f16_avx512(const BitmapBlock& s, const SparseOutput& output) {
  return walk_block<F32x16, fp16>(s, output);
}

}  // namespace trimtab
