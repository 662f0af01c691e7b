// AMX, up to 48 rows of x: 16 rows of the weight are expanded into tiles of 64 bytes of K (vpexpandw or
// vpexpandb, the bits as mask), and each tile meets one to three panels of 16 rows of x. The sums stay in
// tiles over all of K.
//
//   Expanding is the cost: 64 bytes of a row take two uops of vpexpand and one of kmov, all on port 5, so 3
//   cycles, 48 a tile; a product takes 16. So two chunks of K alternate: while the tile unit multiplies one,
//   the vector unit expands the next, two rows after each step. With the weight in L2 that takes 7 cycles for
//   64 bf16 weights, of 6; 10 while the other thread of the core is busy.
//
//   With the weight in memory the line fill buffers are the next limit: its lines on their way hold them, and
//   each step brings 16 lines of x from L2. So up to four or eight rows of x make a panel as narrow, of 4 or 8
//   lines a step (bf16, four rows, 90 %: 1.13 times as fast).
//
//   Rows are read side by side, so no hardware prefetcher sees a stream. The rows that come next lie in one
//   piece, values and bits alike, and are asked for in order, a share with every row that is expanded.
#include <cstring>

#include "cpu/bitmap_tiles.h"
#include "cpu/scratch.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int kRows = 16;  // of the weight, in a tile
constexpr int kChunk = 8;  // steps of K expanded ahead
static_assert(2 * kChunk == kRows, "two rows are expanded after each step");

// 16 rows of the weight, chunk by chunk of K.
template <class Cell>
struct Rows {
  using Value = typename Cell::Value;
  using Word = typename Cell::Word;
  const Value* values[kRows];  // next of each row
  const uint8_t* bits[kRows];

  // Those from n on; past the end of the block its last one again, whose sums are not stored.
  void begin(const BitmapBlock& s, int64_t n) {
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = n + r < s.n_end ? n + r : s.n_end - 1;
      values[r] = static_cast<const Value*>(s.weight.values) + s.weight.row_start[row];
      bits[r] = s.weight.bits + row * s.row_bytes;
    }
  }

  // The next `count` steps of a row, whose bits are at `byte` -> row r of as many tiles.
  TT_INLINE void expand(int r, int64_t byte, char* tiles, int count) {
    if (count == kChunk) expand_steps(r, byte, tiles, kChunk);
    else expand_steps(r, byte, tiles, count);
  }

 private:
  TT_INLINE void expand_steps(int r, int64_t byte, char* tiles, int count) {
    const uint8_t* word_at = bits[r] + byte;
    const Value* from = values[r];
    char* to = tiles + r * 64;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      Word word;
      std::memcpy(&word, word_at + i * sizeof(Word), sizeof(Word));
      _mm512_store_si512(to + i * kTileBytes, Cell::expand(word, from));
      from += __builtin_popcountll(word);
    }
    values[r] = from;
  }
};

// Asks for a piece of memory, an equal share with each call; what it asks for past the end does no harm.
template <int kLines>
struct Ahead {
  const char* at;
  int64_t share;

  Ahead(const void* from, const void* to, int64_t shares) : at(static_cast<const char*>(from)) {
    share = (static_cast<const char*>(to) - at + shares - 1) / shares;
  }
  TT_INLINE void advance() {
    for (int i = 0; i < kLines; ++i) _mm_prefetch(at + i * 64, _MM_HINT_T1);
    at += share;
  }
};

// Sums (tiles 0 to 2, one a panel) += a step of the weight times kPanels panels of x, kCols rows wide.
template <class Cell, int kPanels, int kCols>
TT_INLINE void multiply(const char* a, const char* x, int64_t x_panel) {
  if constexpr (kCols == kSparseM) _tile_stream_loadd(7, x, 64);
  else _tile_loadd(7, x, kCols * 4);
  _tile_loadd(6, a, 64);
  TT_TILE_DOT(0, 6, 7);
  if constexpr (kPanels > 1) {
    _tile_stream_loadd(5, x + x_panel, 64);
    TT_TILE_DOT(1, 6, 5);
  }
  if constexpr (kPanels > 2) {
    _tile_stream_loadd(4, x + 2 * x_panel, 64);
    TT_TILE_DOT(2, 6, 4);
  }
}

// sums [panel][16 n][16 m]: stored, and zero again
template <int kPanels>
inline void store_sums(char* sums) {
  _tile_stored(0, sums, 64);
  _tile_zero(0);
  if constexpr (kPanels > 1) {
    _tile_stored(1, sums + kTileBytes, 64);
    _tile_zero(1);
  }
  if constexpr (kPanels > 2) {
    _tile_stored(2, sums + 2 * kTileBytes, 64);
    _tile_zero(2);
  }
}

// kLines: of values that the share of a row and chunk has.
template <class Cell, int kPanels, int kCols, int kLines>
void panels_block(const BitmapBlock& s, const SparseOutput& output, char* scratch) {
  constexpr int64_t kSlot = kChunk * kTileBytes, kXStep = 64 * kCols;
  const int64_t steps = (s.K * int64_t(sizeof(typename Cell::Value)) + 63) / 64;
  const int64_t chunks = (steps + kChunk - 1) / kChunk;
  const auto steps_of = [&](int64_t chunk) {
    return int(chunk + 1 < chunks ? kChunk : steps - chunk * kChunk);
  };
  const auto* values = static_cast<const typename Cell::Value*>(s.weight.values);
  const int64_t* start = s.weight.row_start;
  char *a = scratch, *next_a = scratch + kSlot, *sums = scratch + 2 * kSlot;
  const int64_t ahead = kRows * (1 + 8 / chunks);  // short rows pass before memory answers
  const Tiles tiles(kCols);  // zeros
  Rows<Cell> rows;
  rows.begin(s, s.n_begin);
  for (int r = 0; r < kRows; ++r) rows.expand(r, 0, a, steps_of(0));
  for (int64_t n = s.n_begin; n < s.n_end; n += kRows) {
    const int64_t after = n + ahead < s.N ? n + ahead : s.N;
    const int64_t end = after + kRows < s.N ? after + kRows : s.N;
    Ahead<kLines> values_ahead(values + start[after], values + start[end], kRows * chunks);
    Ahead<sizeof(typename Cell::Word) / 4> bits_ahead(
        s.weight.bits + after * s.row_bytes, s.weight.bits + end * s.row_bytes, kChunk * chunks);
    const char* x = static_cast<const char*>(s.x);
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kChunk * kXStep) {
      const bool last = chunk + 1 == chunks, more = !last || n + kRows < s.n_end;
      if (last && more) rows.begin(s, n + kRows);
      const int64_t byte = last ? 0 : (chunk + 1) * kChunk * int64_t(sizeof(typename Cell::Word));
      const int count = steps_of(chunk), next = more ? steps_of(last ? 0 : chunk + 1) : 0;
#pragma GCC unroll 1
      for (int i = 0; i < kChunk; ++i) {
        if (i < count)
          multiply<Cell, kPanels, kCols>(a + i * kTileBytes, x + i * kXStep, s.panel_bytes);
        rows.expand(2 * i, byte, next_a, next);
        values_ahead.advance();
        rows.expand(2 * i + 1, byte, next_a, next);
        values_ahead.advance();
        bits_ahead.advance();
      }
      char* const done = a;
      a = next_a;
      next_a = done;
    }
    store_sums<kPanels>(sums);
    const int cols = int(s.n_end - n < kRows ? s.n_end - n : kRows);
    for (int64_t m = 0; m < s.rows; m += kSparseM)
      sparse_store(output, sums + m / kSparseM * kTileBytes, kSparseM, m,
                   int(s.rows - m < kSparseM ? s.rows - m : kSparseM), n, cols);
  }
}

template <class Cell, int kPanels, int kCols>
void panels_lines(const BitmapBlock& s, const SparseOutput& output, char* scratch) {
  // Of a chunk of a row, 512 bytes: those that are kept, rounded up but for an eighth.
  const int64_t all = s.N * s.K, lines = (s.weight.count * 8 + all / 8 * 7) / all;
  if (lines <= 1) panels_block<Cell, kPanels, kCols, 1>(s, output, scratch);
  else if (lines <= 2) panels_block<Cell, kPanels, kCols, 2>(s, output, scratch);
  else if (lines <= 4) panels_block<Cell, kPanels, kCols, 4>(s, output, scratch);
  else panels_block<Cell, kPanels, kCols, 8>(s, output, scratch);
}

template <class Cell>
bool few(const BitmapBlock& s, const SparseOutput& output) {
  char* scratch = static_cast<char*>(
      thread_scratch((2 * kChunk + kBitmapFewPanels) * kTileBytes, Scratch::kRow));
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
