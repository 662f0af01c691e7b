// AMX: a block's rows are A tiles as they stand, 16 rows of up to 64 bytes of k; 64 bytes of a panel are a B
// tile. bf16 by tdpbf16ps, int8 by tdpbssd.
//
//   C tiles 2 x 2: 32 outputs by 32 m. A block of 16 outputs meets four panels instead, 1 x 4.
//
//   A tile of fewer k costs a product as many cycles: 16 x 16 blocks of bf16 run at half the rate.
#include <immintrin.h>

#include "cpu/block_linear_store.h"
#include "cpu/isa.h"

namespace trimtab {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16};
};

// Tiles 0 to 3 are sums, 4 and 5 of A with `bytes` of k, 6 and 7 of B.
struct Tiles {
  explicit Tiles(int bytes) {
    TileConfig config;
    for (int a = 4; a < 6; ++a) config.row_bytes[a] = uint16_t(bytes), config.rows[a] = 16;
    for (int b = 6; b < 8; ++b) config.row_bytes[b] = 64, config.rows[b] = uint8_t(bytes / 4);
    // GCC's intrinsic declares that it reads 8 of the 64 bytes; this, that all are needed.
    __asm__ volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// Macros, because the intrinsics need the tile's number as a literal.
#define TT_DOT(c, a, b)                         \
  do {                                          \
    if constexpr (kInt8) _tile_dpbssd(c, a, b); \
    else _tile_dpbf16ps(c, a, b);               \
  } while (0)
#define TT_ZERO4() \
  do {             \
    _tile_zero(0); \
    _tile_zero(1); \
    _tile_zero(2); \
    _tile_zero(3); \
  } while (0)

// What a walk along a row of blocks needs.
struct Walk {
  const tt_block_weight* w;
  int64_t row_bytes, block_bytes;  // of a block
  int64_t step_bytes, steps;  // k bytes of a tile; tiles along a block's row
  int64_t panel_bytes;

  explicit Walk(const BlockTask& t) : w(t.weight), panel_bytes(t.panel_bytes) {
    row_bytes = w->bk * (w->dtype == TT_I8 ? 1 : 2);
    block_bytes = w->bn * row_bytes;
    step_bytes = row_bytes < 64 ? row_bytes : 64;
    steps = row_bytes / step_bytes;
  }
};

constexpr int64_t kTileDwords = 16 * kSparseM;
constexpr int64_t kAhead = 8192;  // bytes of weight asked for before they are needed

// sums[32 n][16 m] of one or two panels, `stride` dwords apart = rows [n, n + 32) of the row's blocks
template <bool kInt8, int kP>
void tile_2n(const Walk& k, int64_t row, int64_t n, const char* x, uint32_t* sums, int64_t stride) {
  TT_ZERO4();
  const char* values = static_cast<const char*>(k.w->values) + n * k.row_bytes;
  for (int64_t b = k.w->crow[row]; b < k.w->crow[row + 1]; ++b) {
    const char* a = values + b * k.block_bytes;
    const char* from = x + k.w->col[b] * k.row_bytes * 16;
    if (kP == 1 && n == 0) {  // with few rows the weight streams from memory
      for (int64_t at = 0; at < k.block_bytes; at += 64) _mm_prefetch(a + kAhead + at, _MM_HINT_T1);
    }
    for (int64_t s = 0; s < k.steps; ++s, a += 64, from += kSparseStepBytes) {
      _tile_loadd(6, from, 64);
      _tile_loadd(4, a, k.row_bytes);
      TT_DOT(0, 4, 6);
      _tile_loadd(5, a + 16 * k.row_bytes, k.row_bytes);
      TT_DOT(1, 5, 6);
      if constexpr (kP == 2) {
        _tile_loadd(7, from + k.panel_bytes, 64);
        TT_DOT(2, 4, 7);
        TT_DOT(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileDwords, 64);
  if constexpr (kP == 2) {
    _tile_stored(2, sums + stride, 64);
    _tile_stored(3, sums + stride + kTileDwords, 64);
  }
}

// sums[16 n][16 m] of one, two or four panels
template <bool kInt8, int kP>
void tile_1n(const Walk& k, int64_t row, int64_t n, const char* x, uint32_t* sums, int64_t stride) {
  TT_ZERO4();
  const char* values = static_cast<const char*>(k.w->values) + n * k.row_bytes;
  for (int64_t b = k.w->crow[row]; b < k.w->crow[row + 1]; ++b) {
    const char* a = values + b * k.block_bytes;
    const char* from = x + k.w->col[b] * k.row_bytes * 16;
    for (int64_t s = 0; s < k.steps; ++s, a += 64, from += kSparseStepBytes) {
      _tile_loadd(4, a, k.row_bytes);
      _tile_loadd(6, from, 64);
      TT_DOT(0, 4, 6);
      if constexpr (kP > 1) {
        _tile_loadd(7, from + k.panel_bytes, 64);
        TT_DOT(1, 4, 7);
      }
      if constexpr (kP > 2) {
        _tile_loadd(6, from + 2 * k.panel_bytes, 64);
        TT_DOT(2, 4, 6);
        _tile_loadd(7, from + 3 * k.panel_bytes, 64);
        TT_DOT(3, 4, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (kP > 1) _tile_stored(1, sums + stride, 64);
  if constexpr (kP > 2) {
    _tile_stored(2, sums + 2 * stride, 64);
    _tile_stored(3, sums + 3 * stride, 64);
  }
}

constexpr int64_t kPanelSums = int64_t(kSparseTileN) * kSparseM;

// The group's sums for kP panels: 32 outputs at a time where the block has them, and 16 for what is left.
template <bool kInt8, int kP>
void panels(const Walk& walk, const BlockGroup& g, const char* x, uint32_t* sums) {
  for (int64_t row = g.row; row < g.row_end; ++row) {
    int64_t n = g.begin;
    const auto at = [&] { return sums + ((row - g.row) * walk.w->bn + n - g.begin) * kSparseM; };
    for (; n + 32 <= g.end; n += 32) {
      if constexpr (kP == 1) tile_2n<kInt8, 1>(walk, row, n, x, at(), kPanelSums);
      for (int p = 0; p + 2 <= kP; p += 2)
        tile_2n<kInt8, 2>(walk, row, n, x + p * walk.panel_bytes, at() + p * kPanelSums,
                          kPanelSums);
    }
    if (n < g.end) tile_1n<kInt8, kP>(walk, row, n, x, at(), kPanelSums);
  }
}

template <bool kInt8>
bool run(const BlockTask& t) {
  const Walk walk(t);
  const Tiles tiles(int(walk.step_bytes));
  alignas(64) uint32_t sums[kBlockPanels * kPanelSums];
  const int64_t count = (t.rows + kSparseM - 1) / kSparseM;
  for_each_group(t, [&](const BlockGroup& g) {
    for (int64_t p = 0; p < count;) {
      const char* x = t.x + p * t.panel_bytes;
      const int now = count - p >= 4 ? 4 : count - p >= 2 ? 2 : 1;
      prefetch_group(t, g, p, now);
      if (now == 4) panels<kInt8, 4>(walk, g, x, sums);
      else if (now == 2) panels<kInt8, 2>(walk, g, x, sums);
      else panels<kInt8, 1>(walk, g, x, sums);
      store_group_bf16<kInt8>(t, g, p, now, sums, kPanelSums);
      p += now;
    }
  });
  return true;
}

#undef TT_DOT
#undef TT_ZERO4

}  // namespace

BlockKernel block_kernel_amx(const tt_block_weight& weight) {
  const bool int8 = weight.dtype == TT_I8;
  const int64_t bytes = weight.bk * (int8 ? 1 : 2);
  const bool fills = weight.bn % 16 == 0 && bytes % 4 == 0 && (bytes <= 64 || bytes % 64 == 0);
  if (!fills || (!int8 && (weight.dtype != TT_BF16 || !has_amx_bf16())))
    return {PanelCell::kInt8, nullptr};
  if (int8) return {PanelCell::kInt8, run<true>};
  return {PanelCell::kBf16, run<false>};
}

}  // namespace trimtab
