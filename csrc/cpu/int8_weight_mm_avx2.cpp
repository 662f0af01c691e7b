// AVX2 and FMA. A register holds 8 columns by 4 k. Byte j of each lane, shuffled under the exponent of
// 2^23, is the float 2^23 + code; subtracting 2^23 + zero point leaves the value, exactly.
//
//   4 rows x 16 columns: 8 sums + 2 codes + 2 offsets + 2 weights + 1 broadcast + 1 exponent = 16.
//   1 or 2 rows: x 32 columns, because 2 chains of fma cannot hide their latency of 4 cycles.
#include "cpu/f32x8.h"
#include "cpu/int8_weight_mm.h"

namespace trimtab {
namespace {

// Byte j of each 32-bit lane to its lowest byte, zeros above.
alignas(32) constexpr int32_t kPlace[4][8] = {
    {int32_t(0x80808000), int32_t(0x80808004), int32_t(0x80808008), int32_t(0x8080800c),
     int32_t(0x80808000), int32_t(0x80808004), int32_t(0x80808008), int32_t(0x8080800c)},
    {int32_t(0x80808001), int32_t(0x80808005), int32_t(0x80808009), int32_t(0x8080800d),
     int32_t(0x80808001), int32_t(0x80808005), int32_t(0x80808009), int32_t(0x8080800d)},
    {int32_t(0x80808002), int32_t(0x80808006), int32_t(0x8080800a), int32_t(0x8080800e),
     int32_t(0x80808002), int32_t(0x80808006), int32_t(0x8080800a), int32_t(0x8080800e)},
    {int32_t(0x80808003), int32_t(0x80808007), int32_t(0x8080800b), int32_t(0x8080800f),
     int32_t(0x80808003), int32_t(0x80808007), int32_t(0x8080800b), int32_t(0x8080800f)},
};

struct Lanes8 {
  static constexpr int lanes = 8;
  using F = __m256;
  using V = F32x8;
  using Codes = __m256i;
  // Codes as code + 128, so that a byte is unsigned: 2^23 + 128 is then what value() subtracts.
  static TT_INLINE Codes load_codes(const int8_t* p) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80)));
  }
  static TT_INLINE F offset(F zero) { return _mm256_add_ps(zero, _mm256_set1_ps(8388736.0f)); }
  static TT_INLINE F value(Codes codes, int j, F offset) {
    const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlace[j]));
    const __m256i low = _mm256_shuffle_epi8(codes, place);
    const __m256i number = _mm256_or_si256(low, _mm256_set1_epi32(0x4b000000));
    return _mm256_sub_ps(_mm256_castsi256_ps(number), offset);
  }
  static TT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};

constexpr WeightTileFn kFewRows[2][2] = {{tile<Lanes8, 1, 1>, tile<Lanes8, 1, 2>},
                                         {tile<Lanes8, 2, 1>, tile<Lanes8, 2, 2>}};
constexpr WeightTileFn kManyRows[] = {tile<Lanes8, 1, 1>, tile<Lanes8, 2, 1>, tile<Lanes8, 3, 1>,
                                      tile<Lanes8, 4, 1>};

void block(const WeightBlock& s) {
  if (s.rows <= 2)
    weight_block<32>(s, [](int rows, int panels) { return kFewRows[rows - 1][panels - 1]; });
  else weight_block<16>(s, [](int rows, int) { return kManyRows[rows - 1]; });
}

}  // namespace

const WeightKernel kWeightAvx2 = {4, fill_panel<F32x8>, block, choose_weight_epilogue<F32x8>};

}  // namespace trimtab
