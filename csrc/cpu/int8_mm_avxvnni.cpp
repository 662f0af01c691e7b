// AVX-VNNI, the 256-bit vpdpbusd of CPUs without AVX-512: the same offset scheme as
// int8_mm_avx512.cpp, half as wide.
//
//   5 rows x 1 panel (two registers wide): 10 sums + 2 corrections + 2 weights + 1 = 15 of 16.
#include <immintrin.h>
#include <trimtab/int8_mm.h>

#include "cpu/f32x8.h"
#include "cpu/int8_panel.h"
#include "cpu/quantize_int8.h"

namespace trimtab {
namespace {

constexpr int kMr = 5;

template <int kRows>
void tile(const uint8_t* a, const int8_t* b, int64_t K, int32_t* acc) {
  const __m256i offset = _mm256_set1_epi8(char(0x80));
  __m256i sum[kRows][2], correction[2];
  for (int h = 0; h < 2; ++h) {
    correction[h] = _mm256_setzero_si256();
    for (int r = 0; r < kRows; ++r) sum[r][h] = _mm256_setzero_si256();
  }
  const int64_t groups = (K + 3) / 4;
  for (int64_t g = 0; g < groups;) {
    const int64_t end = g + 16 < groups ? g + 16 : groups;
    for (int64_t at = 0; g < end; ++g, at += 4) {
      __m256i weight[2];
      for (int h = 0; h < 2; ++h) {
        weight[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + g * 64 + h * 32));
        correction[h] = _mm256_dpbusd_avx_epi32(correction[h], offset, weight[h]);
      }
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, a + r * kStepK + at, 4);
        const __m256i value = _mm256_set1_epi32(four);
        for (int h = 0; h < 2; ++h)
          sum[r][h] = _mm256_dpbusd_avx_epi32(sum[r][h], value, weight[h]);
      }
    }
    a += kMr * kStepK;
  }
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h)
      _mm256_store_si256(reinterpret_cast<__m256i*>(acc + r * kMaxTileN + h * 8),
                         _mm256_sub_epi32(sum[r][h], correction[h]));
}

constexpr void (*kTiles[kMr])(const uint8_t*, const int8_t*, int64_t, int32_t*) = {
    tile<1>, tile<2>, tile<3>, tile<4>, tile<5>};

}  // namespace

void int8_pack_a_avxvnni(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  pack_a<kMr, Cell::kUint8>(a, a_stride, rows, K, panel);
}

void int8_quantize_a_avxvnni(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                             void* panel, float* scale) {
  quantize_a<F32x8, kMr, Cell::kUint8>(x, dtype, x_stride, rows, K, panel, scale);
}

void int8_block_avxvnni(const Int8Block& s) {
  const int64_t b_panel = packed_panel_bytes(s.K);
  alignas(64) int32_t acc[kMr * kMaxTileN];
  for_each_tile<kPanelN>(s, [&](int64_t m, int rows, int64_t n, int cols) {
    kTiles[rows - 1](static_cast<const uint8_t*>(s.a) + m / s.mr * s.a_panel_bytes,
                     s.b + n / kPanelN * b_panel, s.K, acc);
    s.epilogue(acc, kMaxTileN, rows, cols, s.a_scale + m, s.b_scale + n, s.bias + n, s.inverse,
               tile_out(s, m, n), s.out_stride);
  });
}

}  // namespace trimtab
