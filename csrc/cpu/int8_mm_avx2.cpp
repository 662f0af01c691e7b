// AVX2: int16 products, because vpmaddubsw saturates on u8 x s8 pairs and -128 must stay exact.
//
//   Each 32-bit cell of the weight holds k0 k1 k2 k3 as int8; two shifts give the int16 pairs (k0,k2)
//   and (k1,k3). Activations stand widened in that order, so vpmaddwd of a broadcast pair yields two
//   products summed in int32, exactly: 32 multiply-adds for two vpmaddwd and two vpaddd.
//
//   4 rows x 1 panel (two registers wide): 8 sums + 4 weight pairs + 2 broadcasts = 14 of 16.
#include <immintrin.h>
#include <trimtab/int8_mm.h>

#include "cpu/f32x8.h"
#include "cpu/int8_epilogue.h"
#include "cpu/int8_panel.h"
#include "cpu/quantize_int8.h"

namespace trimtab {
namespace {

constexpr int kMr = 4;

inline __m256i broadcast_pair(const int16_t* pair) {
  int32_t two;
  std::memcpy(&two, pair, 4);
  return _mm256_set1_epi32(two);
}

template <int kRows>
void tile(const int16_t* a, const int8_t* b, int64_t K, int32_t* acc) {
  __m256i sum[kRows][2];
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  const int64_t groups = (K + 3) / 4;
  for (int64_t g = 0; g < groups;) {
    const int64_t end = g + 16 < groups ? g + 16 : groups;
    for (int64_t at = 0; g < end; ++g, at += 4) {
      __m256i even[2], odd[2];
      for (int h = 0; h < 2; ++h) {
        const __m256i four =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(b + g * 64 + h * 32));
        even[h] = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
        odd[h] = _mm256_srai_epi16(four, 8);
      }
      for (int r = 0; r < kRows; ++r) {
        const __m256i value_even = broadcast_pair(a + r * kStepK + at);
        const __m256i value_odd = broadcast_pair(a + r * kStepK + at + 2);
        for (int h = 0; h < 2; ++h) {
          sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(value_even, even[h]));
          sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(value_odd, odd[h]));
        }
      }
    }
    a += kMr * kStepK;
  }
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h)
      _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kMaxTileN + h * 8), sum[r][h]);
}

constexpr void (*kTiles[kMr])(const int16_t*, const int8_t*, int64_t, int32_t*) = {
    tile<1>, tile<2>, tile<3>, tile<4>};

}  // namespace

void int8_pack_a_avx2(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  pack_a<kMr, Cell::kInt16>(a, a_stride, rows, K, panel);
}

void int8_quantize_a_avx2(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                          void* panel, float* scale) {
  quantize_a<F32x8, kMr, Cell::kInt16>(x, dtype, x_stride, rows, K, panel, scale);
}

void int8_block_avx2(const Int8Block& s) {
  const int64_t b_panel = packed_panel_bytes(s.K);
  alignas(64) int32_t acc[kMr * kMaxTileN];
  for_each_tile<kPanelN>(s, [&](int64_t m, int rows, int64_t n, int cols) {
    const char* a = static_cast<const char*>(s.a) + m / s.mr * s.a_panel_bytes;
    kTiles[rows - 1](reinterpret_cast<const int16_t*>(a), s.b + n / kPanelN * b_panel, s.K, acc);
    s.epilogue(acc, kMaxTileN, rows, cols, s.a_scale + m, s.b_scale + n, s.bias + n, s.inverse,
               tile_out(s, m, n), s.out_stride);
  });
}

EpilogueFn int8_epilogue_avx2(tt_activation activation, tt_dtype out_dtype) {
  return choose_epilogue<F32x8>(activation, out_dtype);
}

}  // namespace trimtab
