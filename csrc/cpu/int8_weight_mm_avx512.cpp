// AVX-512. A register holds 16 columns by 4 k. Byte j of each lane, shuffled under the exponent of 2^23,
// is the float 2^23 + code; subtracting 2^23 + zero point leaves the value, exactly: two instructions a
// vector where shift, shift and convert would be three, and the zero point costs nothing.
//
//   8 rows x 2 panels: 16 sums, 9 instructions of unpacking for 32 fma.
//   Up to 4 rows: x 4 panels; the weight streams, and 4 chains of fma hide their latency.
#include "cpu/f32x16.h"
#include "cpu/int8_weight_mm.h"

namespace trimtab {
namespace {

struct Lanes16 {
  static constexpr int lanes = 16;
  using F = __m512;
  using V = F32x16;
  using Codes = __m512i;
  // Codes as code + 128, so that a byte is unsigned: 2^23 + 128 is then what value() subtracts.
  static TT_INLINE Codes load_codes(const int8_t* p) {
    return _mm512_xor_si512(_mm512_load_si512(p), _mm512_set1_epi8(char(0x80)));
  }
  static TT_INLINE F offset(F zero) { return _mm512_add_ps(zero, _mm512_set1_ps(8388736.0f)); }
  static TT_INLINE F value(Codes codes, int j, F offset) {
    // Byte j of each lane to its lowest byte; the mask keeps the exponent's bytes.
    const __m512i place =
        _mm512_add_epi32(_mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 8, 12)), _mm512_set1_epi32(j));
    const __m512i number =
        _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111u, codes, place);
    return _mm512_sub_ps(_mm512_castsi512_ps(number), offset);
  }
  static TT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};

// [rows - 1][panels - 1]
constexpr WeightTileFn kFewRows[4][4] = {
    {tile<Lanes16, 1, 1>, tile<Lanes16, 1, 2>, tile<Lanes16, 1, 3>, tile<Lanes16, 1, 4>},
    {tile<Lanes16, 2, 1>, tile<Lanes16, 2, 2>, tile<Lanes16, 2, 3>, tile<Lanes16, 2, 4>},
    {tile<Lanes16, 3, 1>, tile<Lanes16, 3, 2>, tile<Lanes16, 3, 3>, tile<Lanes16, 3, 4>},
    {tile<Lanes16, 4, 1>, tile<Lanes16, 4, 2>, tile<Lanes16, 4, 3>, tile<Lanes16, 4, 4>},
};
// [rows - 5][panels - 1]
constexpr WeightTileFn kManyRows[4][2] = {
    {tile<Lanes16, 5, 1>, tile<Lanes16, 5, 2>},
    {tile<Lanes16, 6, 1>, tile<Lanes16, 6, 2>},
    {tile<Lanes16, 7, 1>, tile<Lanes16, 7, 2>},
    {tile<Lanes16, 8, 1>, tile<Lanes16, 8, 2>},
};

WeightTileFn choose(int rows, int panels) {
  return rows <= 4 ? kFewRows[rows - 1][panels - 1] : kManyRows[rows - 5][panels - 1];
}

void block(const WeightBlock& s) {
  s.rows <= 4 ? weight_block<64>(s, choose) : weight_block<32>(s, choose);
}

}  // namespace

const WeightKernel kWeightAvx512 = {8, fill_panel<F32x16>, block, choose_weight_epilogue<F32x16>};

}  // namespace trimtab
