// What bitmap_linear's kernels on AMX share: how weights are expanded into tiles, and the tiles themselves.
#pragma once
#include <immintrin.h>

#include "cpu/bitmap_kernels.h"

namespace trimtab {

// Few rows of x, up to three panels: defined in bitmap_linear_few_amx.cpp, for the blocks of as many.
constexpr int kBitmapFewPanels = 3;
bool bitmap_few_bf16_amx(const BitmapBlock&, const SparseOutput&);
bool bitmap_few_int8_amx(const BitmapBlock&, const SparseOutput&);

namespace {

constexpr int kTileBytes = 1024;  // 16 rows of 64 bytes of K: a step

struct Bf16 {
  using Value = uint16_t;
  using Word = uint32_t;  // the bits of a step
  static inline __m512i expand(Word bits, const Value* from) {
    return _mm512_maskz_expandloadu_epi16(bits, from);
  }
};

struct Int8 {
  using Value = int8_t;
  using Word = uint64_t;
  static inline __m512i expand(Word bits, const Value* from) {
    return _mm512_maskz_expandloadu_epi8(bits, from);
  }
};

#define TT_TILE_DOT(sum, a, b)                                                  \
  do {                                                                          \
    if constexpr (sizeof(typename Cell::Value) == 2) _tile_dpbf16ps(sum, a, b); \
    else _tile_dpbssd(sum, a, b);                                               \
  } while (0)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile state lives as long as this object: left behind, it would slow every context switch. And it is loaded
// anew for every block: after a context switch all tile instructions run one after the other, four to five
// times as slow, until the next load (seen on Emerald Rapids).
struct Tiles {
  // cols: rows of x in tile 7, what tiles of the weight are multiplied with, and in 0 and 1, their sums
  explicit Tiles(int cols = kSparseM) {
    TileConfig config;
    config.row_bytes[0] = config.row_bytes[1] = config.row_bytes[7] = uint16_t(cols * 4);
    // GCC's intrinsic declares that it reads 8 of the 64 bytes; this, that all are needed.
    __asm__ volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace trimtab
