// AVX-512 VNNI: vpdpbusd adds four u8 x s8 products to each of 16 int32 lanes, two a cycle.
//
//   Activations stand as a + 128 (unsigned), so a sum holds 128 * sum_k b too. One more accumulator a
//   column panel, fed with a constant 128, is exactly that, and is subtracted at the end: 8 % more work
//   at 12 rows, and nothing has to be stored beside the weight. int32 may wrap on the way; the
//   difference is exact.
//
//   12 rows x 2 panels: 24 sums + 2 corrections + 2 weights + 1 broadcast = 29 of 32 registers.
//   Up to 8 rows: x 3 panels, 24 + 3 + 3 + 1; up to 5: x 4, 20 + 4 + 4 + 1: the weight streams, and
//   more streams keep it flowing.
#include <immintrin.h>
#include <trimtab/int8_mm.h>

#include "cpu/f32x16.h"
#include "cpu/int8_epilogue.h"
#include "cpu/int8_panel.h"
#include "cpu/quantize_int8.h"

namespace trimtab {
namespace {

constexpr int kMr = 12, kFew = 5;

template <int kRows, int kPanels>
void tile(const uint8_t* a, const int8_t* b, int64_t b_panel, int64_t K, int32_t* acc) {
  const __m512i offset = _mm512_set1_epi8(char(0x80));
  __m512i sum[kRows][kPanels], correction[kPanels];
  for (int p = 0; p < kPanels; ++p) {
    correction[p] = _mm512_setzero_si512();
    for (int r = 0; r < kRows; ++r) sum[r][p] = _mm512_setzero_si512();
  }
  const int64_t groups = (K + 3) / 4;
  for (int64_t g = 0; g < groups;) {
    const int64_t end = g + 16 < groups ? g + 16 : groups;
    for (int64_t at = 0; g < end; ++g, at += 4) {
      __m512i weight[kPanels];
      for (int p = 0; p < kPanels; ++p) {
        weight[p] = _mm512_load_si512(b + p * b_panel + g * 64);
        if (kRows <= 8) _mm_prefetch(b + p * b_panel + g * 64 + 1024, _MM_HINT_T0);
        correction[p] = _mm512_dpbusd_epi32(correction[p], offset, weight[p]);
      }
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, a + r * kStepK + at, 4);
        const __m512i value = _mm512_set1_epi32(four);
        for (int p = 0; p < kPanels; ++p)
          sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], value, weight[p]);
      }
    }
    a += kMr * kStepK;
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p)
      _mm512_store_si512(acc + r * kMaxTileN + p * 16, _mm512_sub_epi32(sum[r][p], correction[p]));
}

using TileFn = void (*)(const uint8_t*, const int8_t*, int64_t, int64_t, int32_t*);
// By rows and column panels, as many panels as leave no register spilled.
constexpr TileFn kTiles[kMr][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>},
    {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>},
    {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>},
    {tile<6, 1>, tile<6, 2>, tile<6, 3>},
    {tile<7, 1>, tile<7, 2>, tile<7, 3>},
    {tile<8, 1>, tile<8, 2>, tile<8, 3>},
    {tile<9, 1>, tile<9, 2>},
    {tile<10, 1>, tile<10, 2>},
    {tile<11, 1>, tile<11, 2>},
    {tile<12, 1>, tile<12, 2>},
};

template <int kTileN>
void block(const Int8Block& s) {
  const int64_t b_panel = packed_panel_bytes(s.K);
  alignas(64) int32_t acc[kMr * kMaxTileN];
  for_each_tile<kTileN>(s, [&](int64_t m, int rows, int64_t n, int cols) {
    const uint8_t* a = static_cast<const uint8_t*>(s.a) + m / s.mr * s.a_panel_bytes;
    const int8_t* b = s.b + n / kPanelN * b_panel;
    const int panels = (cols + 15) / 16;
    kTiles[rows - 1][panels - 1](a, b, b_panel, s.K, acc);
    s.epilogue(acc, kMaxTileN, rows, cols, s.a_scale + m, s.b_scale + n, s.bias + n, s.inverse,
               tile_out(s, m, n), s.out_stride);
  });
}

}  // namespace

void int8_pack_a_avx512(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  pack_a<kMr, Cell::kUint8>(a, a_stride, rows, K, panel);
}

void int8_quantize_a_avx512(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                            void* panel, float* scale) {
  quantize_a<F32x16, kMr, Cell::kUint8>(x, dtype, x_stride, rows, K, panel, scale);
}

// AMX panels are filled with AVX-512.
void int8_quantize_a_amx(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                         void* panel, float* scale) {
  quantize_a<F32x16, 16, Cell::kInt8>(x, dtype, x_stride, rows, K, panel, scale);
}

void int8_block_avx512(const Int8Block& s) {
  if (s.mr <= kFew) return block<64>(s);
  s.mr <= 8 ? block<48>(s) : block<32>(s);
}

EpilogueFn int8_epilogue_avx512(tt_activation activation, tt_dtype out_dtype) {
  return choose_epilogue<F32x16>(activation, out_dtype);
}

}  // namespace trimtab
