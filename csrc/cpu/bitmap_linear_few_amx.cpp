// AMX, up to 48 rows of x: 16 or 32 rows of the weight are expanded into tiles of 64 bytes of K (vpexpandw or
// vpexpandb, the bits as mask), and each tile meets one to three panels of 16 rows of x. The sums stay in tiles
// over all of K.
//
//   Expanding is the cost: 64 bytes of a row take two uops of vpexpand and one of kmov, all on port 5, so 3
//   cycles, 48 a tile; a product takes 16. So two chunks of K alternate: while the tile unit multiplies one,
//   the vector unit expands the next, some rows after each step. With the weight in L2 that takes 3.6 to 4.4
//   cycles for 64 bytes; 5 to 8 while the other thread of the core is busy.
//
//   After port 5 it is loads that set the pace, above all then: one for the tile of the weight, one for that of
//   x, one for the bits, and two for the values, whose 64 bytes nearly always cross a line. So one panel of x
//   meets two tiles of the weight each time it is loaded (with the weight in L2, 16 rows of x: 1.06 times as
//   fast; from memory on two threads, beside busy ones, no faster), and words of 32 bits come by twos (1.04 times).
//
//   With the weight in memory the line fill buffers are the next limit: its lines on their way hold them, and
//   each step brings 16 lines of x from L2. So up to four or eight rows of x make a panel as narrow, of 4 or 8
//   lines a step (bf16, four rows, 90 %: 1.13 times as fast).
//
//   Rows are read side by side, so no hardware prefetcher sees a stream. The rows that come next lie in one
//   piece, values and bits alike, and are asked for in order, a share with every few that are expanded.
#include <cstring>
#include <utility>

#include "cpu/bitmap_tiles.h"
#include "cpu/scratch.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

// Two chunks expanded ahead, each of 8 KiB: L1 has room for them and for what they are made of.
constexpr int kChunkTiles = 8;

// The geometry of a number of panels of x, kCols rows wide. Two row tiles for two panels, all eight tiles in use,
// would take 1.5 times as long while the core's other thread is busy, though 0.83 times while it is not.
template <class Cell_, int kPanels_, int kCols_>
struct Shape {
  using Cell = Cell_;
  static constexpr int kPanels = kPanels_, kCols = kCols_;
  // Tiles of the weight that meet a tile of x: for int8, narrow x is few lines already (two would take 1.03
  // times as long from memory).
  static constexpr bool kFewLines = sizeof(typename Cell::Value) == 1 && kCols < kSparseM;
  static constexpr int kTall = kPanels == 1 && !kFewLines ? 2 : 1;
  static constexpr int kRows = 16 * kTall;  // of the weight, side by side
  static constexpr int kChunk = kChunkTiles / kTall;  // steps of K
  static constexpr int64_t kStepBytes = kTall * kTileBytes;  // [kRows][64 bytes of K]
};

// The rows of the weight that are side by side, chunk by chunk of K.
template <class S>
struct Rows {
  using Value = typename S::Cell::Value;
  using Word = typename S::Cell::Word;
  const Value* values[S::kRows];  // next of each row
  const uint8_t* bits[S::kRows];

  // Those from n on; past the end of the block its last one again, whose sums are not stored.
  void begin(const BitmapBlock& s, int64_t n) {
    for (int64_t r = 0; r < S::kRows; ++r) {
      const int64_t row = n + r < s.n_end ? n + r : s.n_end - 1;
      values[r] = static_cast<const Value*>(s.weight.values) + s.weight.row_start[row];
      bits[r] = s.weight.bits + row * s.row_bytes;
    }
  }

  // The next `count` steps of a row, whose bits are at `byte` -> its place in as many steps of a chunk.
  TT_INLINE void expand(int64_t r, int64_t byte, char* chunk, int count) {
    const uint8_t* words = bits[r] + byte;
    const Value* from = values[r];
    char* to = chunk + r * 64;
    const auto step = [&](Word word) __attribute__((always_inline)) {
      _mm512_store_si512(to, S::Cell::expand(word, from));
      from += __builtin_popcountll(word);
      to += S::kStepBytes;
    };
    constexpr int kTogether = 8 / sizeof(Word);
    int i = 0;
#pragma GCC unroll 8
    for (; i + kTogether <= count; i += kTogether) {
      uint64_t word;
      std::memcpy(&word, words + i * sizeof(Word), 8);
      step(Word(word));
      if constexpr (kTogether == 2) step(Word(word >> 32));
    }
    if (kTogether == 2 && i < count) {
      Word word;
      std::memcpy(&word, words + i * sizeof(Word), sizeof word);
      step(word);
    }
    values[r] = from;
  }
};

// Asks for a piece of memory, an equal share with each call; what it asks for past the end does no harm.
template <int kLines>
struct Ahead {
  const char* at;
  int64_t share;

  Ahead() = default;
  Ahead(const void* from, const void* to, int64_t shares) : at(static_cast<const char*>(from)) {
    share = (static_cast<const char*>(to) - at + shares - 1) / shares;
  }
  TT_INLINE void advance() {
    for (int i = 0; i < kLines; ++i) _mm_prefetch(at + i * 64, _MM_HINT_T1);
    at += share;
  }
};

// Sums (tiles 0 to 2: row tiles of one panel, or panels) += a step of the weight times kPanels panels of x, kCols
// rows wide.
template <class S>
TT_INLINE void multiply(const char* a, const char* x, int64_t x_panel) {
  using Cell = typename S::Cell;
  if constexpr (S::kCols == kSparseM) _tile_stream_loadd(7, x, 64);
  else _tile_loadd(7, x, S::kCols * 4);
  _tile_loadd(6, a, 64);
  TT_TILE_DOT(0, 6, 7);
  if constexpr (S::kTall > 1) {
    _tile_loadd(5, a + kTileBytes, 64);
    TT_TILE_DOT(1, 5, 7);
  }
  if constexpr (S::kPanels > 1) {
    _tile_stream_loadd(5, x + x_panel, 64);
    TT_TILE_DOT(1, 6, 5);
  }
  if constexpr (S::kPanels > 2) {
    _tile_stream_loadd(4, x + 2 * x_panel, 64);
    TT_TILE_DOT(2, 6, 4);
  }
}

// sums [panel][kRows][16 m]: stored, and zero again
template <class S>
inline void store_sums(char* sums) {
  static_assert(S::kTall == 1 || S::kPanels == 1, "tiles in the order of the sums");
  _tile_stored(0, sums, 64);
  _tile_zero(0);
  if constexpr (S::kTall * S::kPanels > 1) {
    _tile_stored(1, sums + kTileBytes, 64);
    _tile_zero(1);
  }
  if constexpr (S::kPanels > 2) {
    _tile_stored(2, sums + 2 * kTileBytes, 64);
    _tile_zero(2);
  }
}

// One chunk is multiplied, and the next expanded: some rows after each step.
template <class S, int kLines>
struct SideBySide {
  Rows<S> rows;
  Ahead<kLines> values_ahead;
  Ahead<sizeof(typename S::Cell::Word) / 4> bits_ahead;

  // a: `count` steps; next_a: where `next` steps of every row, whose bits are at `byte`, go
  TT_INLINE void run(const char* a, const char* x, int64_t x_panel, int count, char* next_a,
                     int64_t byte, int next) {
    constexpr int64_t kTurn = 2 * S::kTall;  // rows, and with them a share of each row tile's
#pragma GCC unroll 1
    for (int64_t i = 0; i < S::kChunk; ++i) {
      if (i < count) multiply<S>(a + i * S::kStepBytes, x + i * 64 * S::kCols, x_panel);
      constexpr int64_t kRowsAStep = S::kRows / S::kChunk;
#pragma GCC unroll 1
      for (int64_t r = i * kRowsAStep; r < (i + 1) * kRowsAStep; r += kTurn) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTurn; ++j) {
          rows.expand(r + j, byte, next_a, next);
          if (j % S::kTall == 0) values_ahead.advance();
        }
        bits_ahead.advance();
      }
    }
  }
};

// kLines: of values that the share of S::kTall rows and a chunk has.
template <class S, int kLines>
void panels_block(const BitmapBlock& s, const SparseOutput& output, char* scratch) {
  using Value = typename S::Cell::Value;
  using Word = typename S::Cell::Word;
  constexpr int kRows = S::kRows, kChunk = S::kChunk;
  const int64_t steps = (s.K * int64_t(sizeof(Value)) + 63) / 64;
  const int64_t chunks = (steps + kChunk - 1) / kChunk;
  const auto steps_of = [&](int64_t chunk) {
    return int(chunk + 1 < chunks ? kChunk : steps - chunk * kChunk);
  };
  const auto* values = static_cast<const Value*>(s.weight.values);
  const int64_t* start = s.weight.row_start;
  char *a = scratch, *next_a = scratch + kChunk * S::kStepBytes,
       *sums = scratch + 2 * kChunk * S::kStepBytes;
  const int64_t ahead =
      kRows * (1 + 8 / (chunks * S::kTall));  // short rows pass before memory answers
  const int64_t shares = kRows / S::kTall * chunks;
  const Tiles tiles(S::kCols);  // zeros
  SideBySide<S, kLines> side;
  side.rows.begin(s, s.n_begin);
  for (int r = 0; r < kRows; ++r) side.rows.expand(r, 0, a, steps_of(0));
  for (int64_t n = s.n_begin; n < s.n_end; n += kRows) {
    const int64_t after = n + ahead < s.N ? n + ahead : s.N;
    const int64_t end = after + kRows < s.N ? after + kRows : s.N;
    side.values_ahead = {values + start[after], values + start[end], shares};
    side.bits_ahead = {s.weight.bits + after * s.row_bytes, s.weight.bits + end * s.row_bytes,
                       shares / 2};
    const char* x = static_cast<const char*>(s.x);
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kChunk * 64 * S::kCols) {
      const bool last = chunk + 1 == chunks, more = !last || n + kRows < s.n_end;
      if (last && more) side.rows.begin(s, n + kRows);
      const int64_t byte = last ? 0 : (chunk + 1) * kChunk * int64_t(sizeof(Word));
      const int count = steps_of(chunk), next = more ? steps_of(last ? 0 : chunk + 1) : 0;
      if (next == kChunk) side.run(a, x, s.panel_bytes, count, next_a, byte, kChunk);
      else side.run(a, x, s.panel_bytes, count, next_a, byte, next);
      std::swap(a, next_a);
    }
    store_sums<S>(sums);
    const int cols = int(s.n_end - n < kRows ? s.n_end - n : kRows);
    for (int64_t m = 0; m < s.rows; m += kSparseM)
      sparse_store(output, sums + m / kSparseM * kRows * 64, kSparseM, m,
                   int(s.rows - m < kSparseM ? s.rows - m : kSparseM), n, cols);
  }
}

template <class Cell, int kPanels, int kCols>
void panels_lines(const BitmapBlock& s, const SparseOutput& output, char* scratch) {
  using S = Shape<Cell, kPanels, kCols>;
  // Of 512 bytes of the weight: those that are kept, rounded up but for an eighth.
  const int64_t all = s.N * s.K, lines = (s.weight.count * 8 + all / 8 * 7) / all;
  if (lines <= 1) panels_block<S, 1>(s, output, scratch);
  else if (lines <= 2) panels_block<S, 2>(s, output, scratch);
  else if (lines <= 4) panels_block<S, 4>(s, output, scratch);
  else panels_block<S, 8>(s, output, scratch);
}

template <class Cell>
bool few(const BitmapBlock& s, const SparseOutput& output) {
  char* scratch = static_cast<char*>(
      thread_scratch((2 * kChunkTiles + kBitmapFewPanels) * kTileBytes, Scratch::kRow));
  if (scratch == nullptr) return false;
  if (s.cols == 4) panels_lines<Cell, 1, 4>(s, output, scratch);
  else if (s.cols == 8) panels_lines<Cell, 1, 8>(s, output, scratch);
  else if (s.rows <= kSparseM) panels_lines<Cell, 1, kSparseM>(s, output, scratch);
  else if (s.rows <= 2 * kSparseM) panels_lines<Cell, 2, kSparseM>(s, output, scratch);
  else panels_lines<Cell, kBitmapFewPanels, kSparseM>(s, output, scratch);
  return true;
}

}  // namespace

bool bitmap_few_bf16_amx(const BitmapBlock& s, const SparseOutput& output) {
  return few<Bf16>(s, output);
}
bool bitmap_few_int8_amx(const BitmapBlock& s, const SparseOutput& output) {
  return few<Int8>(s, output);
}

}  // namespace trimtab
