// AMX: a tile multiplies 16 rows by 16 columns over 64 steps of K in 16 cycles (tdpbssd).
//
//   C tiles 2 x 2: four independent sums cover the 52-cycle latency, and each loaded A and B tile is
//   used twice, so four tile loads (32 cycles of the two load ports) stand against 64 of multiplying.
//   With one row panel (M <= 16): 1 x 4.
#include <immintrin.h>
#include <trimtab/int8_mm.h>

#include "cpu/int8_panel.h"

namespace trimtab {
namespace {

constexpr int kMr = 16;
constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes, of A and of B alike

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile state lives as long as this object: left behind, it would slow every context switch and keep
// the core from its deeper sleep states.
struct Tiles {
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// acc[32][kMaxTileN] = two row panels times two column panels
inline void tile_2x2(const int8_t* a0, const int8_t* a1, const int8_t* b0, const int8_t* b1,
                     int64_t steps, int32_t* acc) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, b0 + s * kTileBytes, 64);
    _tile_loadd(4, a0 + s * kTileBytes, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b1 + s * kTileBytes, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, a1 + s * kTileBytes, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  constexpr int64_t kStride = kMaxTileN * 4;
  _tile_stored(0, acc, kStride);
  _tile_stored(1, acc + 16, kStride);
  _tile_stored(2, acc + 16 * kMaxTileN, kStride);
  _tile_stored(3, acc + 16 * kMaxTileN + 16, kStride);
}

// acc[16][kMaxTileN] = one row panel times kNt column panels
template <int kNt>
inline void tile_1xn(const int8_t* a, const int8_t* b, int64_t b_panel, int64_t steps, int32_t* acc) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const int8_t* bs = b + s * kTileBytes;
    _tile_loadd(4, a + s * kTileBytes, 64);
    _tile_loadd(5, bs, 64);
    _tile_dpbssd(0, 4, 5);
    if constexpr (kNt > 1) {
      _tile_loadd(6, bs + b_panel, 64);
      _tile_dpbssd(1, 4, 6);
    }
    if constexpr (kNt > 2) {
      _tile_loadd(7, bs + 2 * b_panel, 64);
      _tile_dpbssd(2, 4, 7);
    }
    if constexpr (kNt > 3) {
      _tile_loadd(5, bs + 3 * b_panel, 64);
      _tile_dpbssd(3, 4, 5);
    }
  }
  constexpr int64_t kStride = kMaxTileN * 4;
  _tile_stored(0, acc, kStride);
  if constexpr (kNt > 1) _tile_stored(1, acc + 16, kStride);
  if constexpr (kNt > 2) _tile_stored(2, acc + 32, kStride);
  if constexpr (kNt > 3) _tile_stored(3, acc + 48, kStride);
}

void one_panel(const Int8Block& s, int64_t m, int64_t n, int rows, int cols, int32_t* acc) {
  const int64_t b_panel = packed_panel_bytes(s.K), steps = round_up(s.K, kStepK) / kStepK;
  const int8_t* a = static_cast<const int8_t*>(s.a) + m / kMr * s.a_panel_bytes;
  const int8_t* b = s.b + n / kPanelN * b_panel;
  switch ((cols + 15) / 16) {
    case 1: tile_1xn<1>(a, b, b_panel, steps, acc); break;
    case 2: tile_1xn<2>(a, b, b_panel, steps, acc); break;
    case 3: tile_1xn<3>(a, b, b_panel, steps, acc); break;
    default: tile_1xn<4>(a, b, b_panel, steps, acc);
  }
  s.epilogue(acc, rows, cols, s.a_scale + m, s.b_scale + n, s.bias + n, tile_out(s, m, n),
             s.out_stride);
}

}  // namespace

void int8_pack_a_amx(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  pack_a<kMr, Cell::kInt8>(a, a_stride, rows, K, panel);
}

void int8_block_amx(const Int8Block& s) {
  const Tiles tiles;
  alignas(64) int32_t acc[kMaxTileM * kMaxTileN];
  if (s.rows <= kMr) {
    for_each_tile<kMr, 64>(s, [&](int64_t m, int rows, int64_t n, int cols) {
      one_panel(s, m, n, rows, cols, acc);
    });
    return;
  }
  const int64_t b_panel = packed_panel_bytes(s.K), steps = round_up(s.K, kStepK) / kStepK;
  for_each_tile<2 * kMr, 32>(s, [&](int64_t m, int rows, int64_t n, int cols) {
    if (rows <= kMr || cols <= 16) {
      one_panel(s, m, n, rows < kMr ? rows : kMr, cols, acc);
      if (rows > kMr) one_panel(s, m + kMr, n, rows - kMr, cols, acc);
      return;
    }
    const int8_t* a = static_cast<const int8_t*>(s.a) + m / kMr * s.a_panel_bytes;
    const int8_t* b = s.b + n / kPanelN * b_panel;
    tile_2x2(a, a + s.a_panel_bytes, b, b + b_panel, steps, acc);
    s.epilogue(acc, rows, cols, s.a_scale + m, s.b_scale + n, s.bias + n, tile_out(s, m, n),
               s.out_stride);
  });
}

}  // namespace trimtab
