// AMX: a tile multiplies 16 rows by 16 columns over 64 steps of K in 16 cycles (tdpbssd).
//
//   C tiles 2 x 2: four independent sums cover the 52-cycle latency, and four or five tile loads (32 or
//   40 cycles of the two load ports) stand against 64 of multiplying. With one row panel (M <= 16):
//   1 x 4; with up to 24 rows 2 x 1, with three panels 3 x 1.
//
//   As few tiles as do no harm: 0 to 3 sums, 5 and 6 of A, 7 of B; what is not used stays as the
//   configuration left it, empty. A loaded tile takes a physical register that a next load could be
//   renamed to, and on a machine whose other hardware thread is at work few are left: a tdpbssd with
//   its loads then took 53 ticks of the time stamp with eight tiles in use, 38 with seven and 34 with
//   six; 13.5 with any number when left alone.
//
//   Panels of fewer rows (Int8Block::mr) cost less only where a B tile serves two products in a row:
//   a product takes as many cycles as its A tile has rows, but 16 where B is new.
#include <immintrin.h>
#include <trimtab/int8_mm.h>

#include "cpu/int8_panel.h"

namespace trimtab {
namespace {

constexpr int kMr = 16;
constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes, of A and of B alike
constexpr int64_t kMaxStepsL1 = 16;  // steps of K whose 2 KiB of weight stay in L1: 32 of 48 KiB
constexpr int kFewRows = 24;  // up to here two row panels meet one column panel, not two
constexpr int kMaxPairs = kMaxBlockM / kMaxTileM;  // row pairs of a block
constexpr int kPairN = 32, kPairSums = kMaxTileM * kPairN;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// Tile state lives as long as this object: left behind, it would slow every context switch and keep
// the core from its deeper sleep states.
struct Tiles {
  explicit Tiles(int mr) {
    TileConfig config;
    for (int tile = 0; tile < 7; ++tile) config.rows[tile] = uint8_t(mr);
    config.rows[7] = 16;
    // GCC's intrinsic declares that it reads 8 of the 64 bytes; this, that all are needed.
    __asm__ volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// A computed tile whose epilogue is still to run. It runs a few rows at a time between the k-steps of the
// next tile: the tile unit and the vector units then work side by side.
struct Pending {
  const int32_t* acc = nullptr;
  int stride = 0, rows = 0, cols = 0, done = 0;
  int64_t m = 0, n = 0;

  void advance(const Int8Block& s, int count) {
    if (done >= rows) return;
    if (count > rows - done) count = rows - done;
    s.epilogue(acc + done * stride, stride, count, cols, s.a_scale + m + done, s.b_scale + n,
               s.bias + n, s.inverse, tile_out(s, m + done, n), s.out_stride);
    done += count;
  }
};

// Lines that will be needed one tile later, asked for a few at a time between k-steps: the output lines
// that this tile will write (their read for ownership from L3 takes 100 ns each, more than computing
// them) and the weight of the next column pair.
struct Ahead {
  char* out = nullptr;
  int64_t out_stride = 0;  // bytes
  int rows = 0, row_lines = 0;
  const int8_t* weight = nullptr;  // its lines for this tile, or NULL
  int lines_a_step = 0;

  void advance(int row_count) {
    for (; row_count > 0 && rows > 0; --row_count, --rows, out += out_stride)
      for (int line = 0; line < row_lines; ++line) __builtin_prefetch(out + line * 64, 1, 3);
    if (weight == nullptr) return;
    for (int line = 0; line < lines_a_step; ++line, weight += 64)
      _mm_prefetch(reinterpret_cast<const char*>(weight), _MM_HINT_T1);
  }
};

// Which operand passes through L1 once, and so is loaded without displacing the other.
enum class Stream { kA, kB };

// A macro, because the intrinsics need the tile's number as a literal.
#define TT_TILE_LOAD(stream, tile, from)                      \
  do {                                                        \
    if constexpr (stream) _tile_stream_loadd(tile, from, 64); \
    else _tile_loadd(tile, from, 64);                         \
  } while (0)

// acc[2 * mr][kPairN] (+)= two row panels times two column panels, over `steps` steps of K
template <Stream kStream>
inline void tile_2x2(const int8_t* a, int64_t a_panel, const int8_t* b, int64_t b_panel,
                     int64_t steps, bool add, int32_t* acc, const Int8Block& s, Pending& pending,
                     Ahead ahead) {
  constexpr int64_t kStride = kPairN * 4;
  constexpr bool kStreamA = kStream == Stream::kA, kStreamB = kStream == Stream::kB;
  int32_t* lower = acc + s.mr * kPairN;
  if (add) {
    _tile_loadd(0, acc, kStride);
    _tile_loadd(1, acc + 16, kStride);
    _tile_loadd(2, lower, kStride);
    _tile_loadd(3, lower + 16, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int rows_a_step = int((2 * s.mr + steps - 1) / steps);
  for (int64_t k = 0; k < steps; ++k, a += kTileBytes, b += kTileBytes) {
    TT_TILE_LOAD(kStreamB, 7, b);
    TT_TILE_LOAD(kStreamA, 6, a);
    _tile_dpbssd(0, 6, 7);
    if constexpr (kStreamA) {  // seven tiles; six, with a or b loaded again, are 5 to 11 % slower
      TT_TILE_LOAD(true, 5, a + a_panel);
      _tile_dpbssd(2, 5, 7);
      TT_TILE_LOAD(false, 7, b + b_panel);
      _tile_dpbssd(1, 6, 7);
      _tile_dpbssd(3, 5, 7);
    } else {  // a lies in L1: six tiles
      TT_TILE_LOAD(false, 6, a + a_panel);
      _tile_dpbssd(2, 6, 7);
      TT_TILE_LOAD(true, 7, b + b_panel);
      _tile_dpbssd(3, 6, 7);
      TT_TILE_LOAD(false, 6, a);
      _tile_dpbssd(1, 6, 7);
    }
    ahead.advance(rows_a_step);
    pending.advance(s, rows_a_step);
  }
  _tile_stored(0, acc, kStride);
  _tile_stored(1, acc + 16, kStride);
  _tile_stored(2, lower, kStride);
  _tile_stored(3, lower + 16, kStride);
}

// acc[mr][kMaxTileN] = one row panel times kNt column panels
template <int kNt>
inline void tile_1xn(const int8_t* a, const int8_t* b, int64_t b_panel, int64_t steps,
                     int32_t* acc) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k, a += kTileBytes, b += kTileBytes) {
    _tile_loadd(6, a, 64);
    TT_TILE_LOAD(true, 7, b);
    _tile_dpbssd(0, 6, 7);
    if constexpr (kNt > 1) {
      TT_TILE_LOAD(true, 7, b + b_panel);
      _tile_dpbssd(1, 6, 7);
    }
    if constexpr (kNt > 2) {
      TT_TILE_LOAD(true, 7, b + 2 * b_panel);
      _tile_dpbssd(2, 6, 7);
    }
    if constexpr (kNt > 3) {
      TT_TILE_LOAD(true, 7, b + 3 * b_panel);
      _tile_dpbssd(3, 6, 7);
    }
  }
  constexpr int64_t kStride = kMaxTileN * 4;
  _tile_stored(0, acc, kStride);
  if constexpr (kNt > 1) _tile_stored(1, acc + 16, kStride);
  if constexpr (kNt > 2) _tile_stored(2, acc + 32, kStride);
  if constexpr (kNt > 3) _tile_stored(3, acc + 48, kStride);
}

// acc[kPanels * mr][kPairN], 16 columns of it, = kPanels row panels times one column panel
template <int kPanels>
inline void tile_nx1(const int8_t* a, int64_t a_panel, const int8_t* b, int64_t steps, int32_t* acc,
                     const Int8Block& s, Pending& pending, Ahead ahead) {
  constexpr int64_t kStride = kPairN * 4;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kPanels > 2) _tile_zero(2);
  // A pair of columns is two of these tiles, and half of the rows are done in each.
  const int rows_a_step = steps > 0 ? int((kPanels * s.mr + 2 * steps - 1) / (2 * steps)) : 0;
  for (int64_t k = 0; k < steps; ++k, a += kTileBytes, b += kTileBytes) {
    TT_TILE_LOAD(true, 7, b);
    _tile_loadd(6, a, 64);
    _tile_dpbssd(0, 6, 7);
    _tile_loadd(6, a + a_panel, 64);
    _tile_dpbssd(1, 6, 7);
    if constexpr (kPanels > 2) {
      _tile_loadd(6, a + 2 * a_panel, 64);
      _tile_dpbssd(2, 6, 7);
    }
    ahead.advance(rows_a_step);
    pending.advance(s, rows_a_step);
  }
  _tile_stored(0, acc, kStride);
  _tile_stored(1, acc + s.mr * kPairN, kStride);
  if constexpr (kPanels > 2) _tile_stored(2, acc + 2 * s.mr * kPairN, kStride);
}

// A block of kPanels row panels: the weight passes once, and each tile of it meets all rows at once.
template <int kPanels>
void few_rows(const Int8Block& s) {
  constexpr int kSlot = kPanels * kMr * kPairN;
  alignas(64) int32_t acc[2 * kSlot];  // one slot is computed while the other's epilogue runs
  const int64_t b_panel = packed_panel_bytes(s.K), steps = round_up(s.K, kStepK) / kStepK;
  const bool far = s.N * s.K > kWeightInL2;
  const int8_t* a = static_cast<const int8_t*>(s.a);
  Pending pending;
  for (int64_t n = s.n_begin; n < s.n_end; n += kPairN) {
    int32_t* sums = pending.acc == acc ? acc + kSlot : acc;
    const int cols = int(s.n_end - n < kPairN ? s.n_end - n : kPairN);
    for (int half = 0; half < cols; half += kPanelN) {
      const int8_t* b = s.b + (n + half) / kPanelN * b_panel;
      Ahead ahead;
      if (half == 0)
        ahead = {
            tile_out(s, 0, n), s.out_stride * s.out_size, int(s.rows), s.out_size / 2, nullptr, 0};
      if (far && n + half + kPairN < s.n_end) {
        ahead.weight = b + 2 * b_panel;
        ahead.lines_a_step = kTileBytes / 64;
      }
      tile_nx1<kPanels>(a, s.a_panel_bytes, b, steps, sums + half, s, pending, ahead);
    }
    pending.advance(s, int(s.rows));
    pending = {sums, kPairN, int(s.rows), cols, 0, 0, n};
  }
  pending.advance(s, int(s.rows));
}

// Rows [m, m + rows) of one row panel by cols <= 64 columns, epilogue included.
void one_panel(const Int8Block& s, int64_t m, int64_t n, int rows, int cols) {
  alignas(64) int32_t acc[kMr * kMaxTileN];
  const int64_t b_panel = packed_panel_bytes(s.K), steps = round_up(s.K, kStepK) / kStepK;
  const int8_t* a = static_cast<const int8_t*>(s.a) + m / s.mr * s.a_panel_bytes;
  const int8_t* b = s.b + n / kPanelN * b_panel;
  switch ((cols + 15) / 16) {
    case 1: tile_1xn<1>(a, b, b_panel, steps, acc); break;
    case 2: tile_1xn<2>(a, b, b_panel, steps, acc); break;
    case 3: tile_1xn<3>(a, b, b_panel, steps, acc); break;
    default: tile_1xn<4>(a, b, b_panel, steps, acc);
  }
  Pending now{acc, kMaxTileN, rows, cols, 0, m, n};
  now.advance(s, rows);
}

// One column pair of panels against all row pairs of the block. K is cut so that the columns' part of
// the weight (32 columns x kMaxStepsL1 x 64 bytes = 32 KiB) stays in L1 while the activations stream
// from L2; sums wait in `acc`, one tile a row pair, between the cuts.
template <Stream kStream>
void column_pair(const Int8Block& s, int64_t n, int cols, int32_t* acc, Pending& pending) {
  const int64_t b_panel = packed_panel_bytes(s.K), steps = round_up(s.K, kStepK) / kStepK;
  const int64_t cuts = (steps + kMaxStepsL1 - 1) / kMaxStepsL1;
  const int64_t cut = (steps + cuts - 1) / cuts;
  const int8_t* b = s.b + n / kPanelN * b_panel;
  // The next pair's 2 * b_panel bytes are contiguous; each tile of this one asks for an equal share. A
  // weight that lies in L2 anyway only loses by being asked for (24 to 28 us at 32 x 1024 x 1024).
  const bool far = s.N * s.K > kWeightInL2 && n + 2 * kPairN <= s.n_end;
  const int8_t* next = far ? b + 2 * b_panel : nullptr;
  const int64_t pairs = (s.rows + s.mr - 1) / (2 * s.mr), tile_steps = pairs * steps;
  const int lines_a_step = int((2 * b_panel / 64 + tile_steps - 1) / tile_steps);
  for (int64_t k = 0; k < steps; k += cut) {
    const int64_t count = steps - k < cut ? steps - k : cut;
    const bool last = k + count == steps;
    for (int64_t m = 0, tile = 0; m + s.mr < s.rows; m += 2 * s.mr, ++tile) {
      // Sums of several cuts wait, each in its own slot; else two slots alternate, one being computed
      // while the other's epilogue runs.
      const int64_t slot = cuts > 1 && s.rows > 2 * s.mr ? tile : pending.acc == acc;
      int32_t* sums = acc + slot * kPairSums;
      const int8_t* a = static_cast<const int8_t*>(s.a) + m / s.mr * s.a_panel_bytes;
      const int rows = int(s.rows - m < 2 * s.mr ? s.rows - m : 2 * s.mr);
      Ahead ahead;
      if (last)
        ahead = {tile_out(s, m, n), s.out_stride * s.out_size, rows, s.out_size / 2, nullptr, 0};
      if (next != nullptr) {
        ahead.weight = next + (k * pairs + tile * count) * lines_a_step * 64;
        ahead.lines_a_step = lines_a_step;
      }
      tile_2x2<kStream>(a + k * kTileBytes, s.a_panel_bytes, b + k * kTileBytes, b_panel, count,
                        k > 0, sums, s, pending, ahead);
      if (!last) continue;
      pending.advance(s, kMaxTileM);
      pending = {sums, kPairN, rows, cols, 0, m, n};
    }
  }
}

}  // namespace

void int8_pack_a_amx(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  pack_a<kMr, Cell::kInt8>(a, a_stride, rows, K, panel);
}

void int8_block_amx(const Int8Block& s) {
  const Tiles tiles(s.mr);
  if (s.rows <= s.mr) {
    for_each_tile<kMaxTileN>(
        s, [&](int64_t m, int rows, int64_t n, int cols) { one_panel(s, m, n, rows, cols); });
    return;
  }
  // Two sums leave the tile unit waiting (26 cycles a product, not 16), but the fewest tiles are in use:
  // with the other hardware thread at work 17 x 1024 x 1024 takes 39 us, 2 x 2 48 (alone: 22 and 20).
  if (s.rows <= kFewRows && s.rows <= 2 * s.mr) return few_rows<2>(s);
  if (s.rows > 2 * s.mr && s.rows <= 3 * s.mr) return few_rows<3>(s);
  alignas(64) int32_t acc[kMaxPairs * kPairSums];
  Pending pending;
  // With one pair of row panels, those are what is read again for every column.
  const bool one_pair = s.rows <= 2 * s.mr;
  const int64_t last_panel = (s.rows - 1) / s.mr * s.mr;
  const bool odd = last_panel % (2 * s.mr) == 0;
  for (int64_t n = s.n_begin; n < s.n_end; n += kMaxTileN) {
    const int64_t end = s.n_end - n < kMaxTileN ? s.n_end : n + kMaxTileN;
    int64_t pair = n;
    for (; pair + kPanelN < end; pair += kPairN) {
      const int cols = int(end - pair < kPairN ? end - pair : kPairN);
      one_pair ? column_pair<Stream::kB>(s, pair, cols, acc, pending)
               : column_pair<Stream::kA>(s, pair, cols, acc, pending);
    }
    // The odd column panel of the matrix, and the odd row panel of the block: the latter against four
    // column panels at once, since two would leave the tile unit waiting for its own sums.
    if (pair < end) {
      for (int64_t m = 0; m < last_panel + (odd ? 0 : s.mr); m += s.mr)
        one_panel(s, m, pair, int(s.rows - m < s.mr ? s.rows - m : s.mr), int(end - pair));
    }
    if (odd) one_panel(s, last_panel, n, int(s.rows - last_panel), int(end - n));
  }
  pending.advance(s, kMaxTileM);
}

}  // namespace trimtab
