// AMX: 32 rows of the weight are expanded into tiles (vpexpandw or vpexpandb, the bits as mask), 16 rows and 64
// bytes of K each, and meet panels of 16 rows of x, two at a time. For few panels see
// bitmap_linear_few_amx.cpp.
//
//   Two chunks of K alternate: while the tile unit multiplies one, the vector unit expands the next, some rows
//   between any two products. The sums wait in memory between the chunks.
//
//   Rows are read side by side, so no hardware prefetcher sees a stream. The rows that come next lie in one
//   piece, values and bits alike, and are asked for in order, a share with every row that is expanded.
#include <cstring>

#include "cpu/bitmap_tiles.h"
#include "cpu/scratch.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int kTall = 2;  // row tiles of the weight that are expanded together
constexpr int kRows = 16 * kTall;
constexpr int kChunk = 8;  // steps of K expanded ahead
constexpr int64_t kSlotBytes = kTall * kChunk * kTileBytes;

// Asks for a piece of memory, an equal share with each call; what it asks for past the end does no harm.
struct Ahead {
  const char* at = nullptr;
  int lines = 0;

  void begin(const void* from, const void* to, int64_t shares) {
    at = static_cast<const char*>(from);
    lines = int((static_cast<const char*>(to) - at + 64 * shares - 1) / (64 * shares));
  }
  void advance() {
    const char* line = at;
    for (int i = 0; i < lines; ++i, line += 64) _mm_prefetch(line, _MM_HINT_T1);
    at = line;
  }
};

// Expands the weight's rows [n_begin, n_end), kRows at a time, chunk by chunk of K, a row with each advance().
template <class Cell>
class Expander {
 public:
  using Value = typename Cell::Value;
  using Word = typename Cell::Word;

  Expander(const BitmapBlock& block, int64_t steps) : s_(block), steps_(steps), n_(block.n_begin) {
    begin_rows();
  }

  // The next chunk, into the other slot. False after the last one.
  bool begin_chunk(char* slot) {
    if (step_ == steps_) {
      n_ += kRows;
      step_ = 0;
      if (n_ >= s_.n_end) return false;
      begin_rows();
    }
    slot_ = slot;
    from_ = step_;
    count_ = int(steps_ - step_ < kChunk ? steps_ - step_ : kChunk);
    step_ += count_;
    row_ = 0;
    return true;
  }

  // Expands rows up to `until` of the chunk begun.
  void advance(int until) {
    for (; row_ < until; ++row_) {
      expand_row();
      values_ahead_.advance();
      bits_ahead_.advance();
    }
  }

 private:
  void begin_rows() {
    const int64_t* start = s_.weight.row_start;
    const Value* values = static_cast<const Value*>(s_.weight.values);
    rows_ = int(s_.n_end - n_ < kRows ? s_.n_end - n_ : kRows);
    for (int r = 0; r < rows_; ++r) next_[r] = values + start[n_ + r];
    const int64_t after = n_ + rows_, end = after + kRows < s_.N ? after + kRows : s_.N;
    const int64_t chunks = (steps_ + kChunk - 1) / kChunk;
    values_ahead_.begin(values + start[after], values + start[end], rows_ * chunks);
    bits_ahead_.begin(s_.weight.bits + after * s_.row_bytes, s_.weight.bits + end * s_.row_bytes,
                      rows_ * chunks);
  }

  void expand_row() {
    char* to = slot_ + (row_ / 16 * kChunk * 16 + row_ % 16) * 64;
    if (row_ >= rows_) {
      for (int i = 0; i < count_; ++i)
        _mm512_store_si512(to + i * kTileBytes, _mm512_setzero_si512());
      return;
    }
    const uint8_t* bits =
        s_.weight.bits + (n_ + row_) * s_.row_bytes + from_ * int64_t(sizeof(Word));
    if (count_ == kChunk) {
      next_[row_] = expand_steps(bits, next_[row_], to, kChunk);
    } else {
      next_[row_] = expand_steps(bits, next_[row_], to, count_);
    }
  }

  static TT_INLINE const Value* expand_steps(const uint8_t* bits, const Value* values, char* to,
                                             int count) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      Word word;
      std::memcpy(&word, bits + i * sizeof(Word), sizeof(Word));
      _mm512_store_si512(to + i * kTileBytes, Cell::expand(word, values));
      values += __builtin_popcountll(word);
    }
    return values;
  }

  const BitmapBlock& s_;
  const int64_t steps_;
  int64_t n_, step_ = 0, from_ = 0;
  int rows_ = 0, row_ = 0, count_ = 0;
  char* slot_ = nullptr;
  const Value* next_[kRows];
  Ahead values_ahead_, bits_ahead_;
};

// Sums (tiles 0 to 3: panel, row tile) += the row tiles of a chunk times kPanels panels, `steps` steps; the
// next chunk's rows are expanded between them, up to `until` in equal parts.
template <class Cell, int kPanels>
inline void multiply(const char* a, const char* x, int64_t x_panel, int steps,
                     Expander<Cell>& expander, int from, int until) {
  constexpr int64_t kLower = kChunk * kTileBytes;
  for (int i = 0; i < steps; ++i, a += kTileBytes, x += kTileBytes) {
    _tile_stream_loadd(7, x, 64);
    _tile_loadd(6, a, 64);
    TT_TILE_DOT(0, 6, 7);
    _tile_loadd(6, a + kLower, 64);
    TT_TILE_DOT(1, 6, 7);
    if constexpr (kPanels > 1) {
      _tile_stream_loadd(7, x + x_panel, 64);
      TT_TILE_DOT(3, 6, 7);
      _tile_loadd(6, a, 64);
      TT_TILE_DOT(2, 6, 7);
    }
    expander.advance(from + (until - from) * (i + 1) / steps);
  }
}

template <int kPanels>
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kPanels > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// sums [panel][kRows][16 m]
template <int kPanels>
inline void load_sums(const char* sums) {
  constexpr int64_t kPanelBytes = kRows * 64;
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kTileBytes, 64);
  if constexpr (kPanels > 1) {
    _tile_loadd(2, sums + kPanelBytes, 64);
    _tile_loadd(3, sums + kPanelBytes + kTileBytes, 64);
  }
}

template <int kPanels>
inline void store_sums(char* sums) {
  constexpr int64_t kPanelBytes = kRows * 64;
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileBytes, 64);
  if constexpr (kPanels > 1) {
    _tile_stored(2, sums + kPanelBytes, 64);
    _tile_stored(3, sums + kPanelBytes + kTileBytes, 64);
  }
}

struct Chunk {
  const char* a;
  int64_t step;  // first
  int steps;
  bool first, last;  // of K
  int64_t n;
};

// One chunk against panels [p, p + kPanels) of x. sums: those panels' place in memory.
template <class Cell, int kPanels>
void chunk_times_panels(const BitmapBlock& s, const SparseOutput& output, const Chunk& chunk,
                        int64_t p, char* sums, Expander<Cell>& expander, int from, int until) {
  if (chunk.first) zero_sums<kPanels>();
  else load_sums<kPanels>(sums);
  const char* x = static_cast<const char*>(s.x) + p * s.panel_bytes + chunk.step * kTileBytes;
  multiply<Cell, kPanels>(chunk.a, x, s.panel_bytes, chunk.steps, expander, from, until);
  store_sums<kPanels>(sums);
  if (!chunk.last) return;
  const int cols = int(s.n_end - chunk.n < kRows ? s.n_end - chunk.n : kRows);
  for (int i = 0; i < kPanels; ++i) {
    const int64_t m = (p + i) * kSparseM;
    sparse_store(output, sums + i * kRows * 64, kSparseM, m,
                 int(s.rows - m < kSparseM ? s.rows - m : kSparseM), chunk.n, cols);
  }
}

template <class Cell>
bool block(const BitmapBlock& s, const SparseOutput& output) {
  const int64_t panels = (s.rows + kSparseM - 1) / kSparseM;
  const int64_t steps = s.panel_bytes / kTileBytes;
  char* scratch = static_cast<char*>(
      thread_scratch(2 * kSlotBytes + round_up(panels, 2) * kRows * 64, Scratch::kRow));
  if (scratch == nullptr) return false;
  char* sums = scratch + 2 * kSlotBytes;
  const Tiles tiles;
  Expander<Cell> expander(s, steps);
  expander.begin_chunk(scratch);
  expander.advance(kRows);
  Chunk chunk{scratch, 0, 0, true, false, s.n_begin};
  for (bool more = true; more;) {
    chunk.steps = int(steps - chunk.step < kChunk ? steps - chunk.step : kChunk);
    chunk.first = chunk.step == 0;
    chunk.last = chunk.step + chunk.steps == steps;
    char* other = chunk.a == scratch ? scratch + kSlotBytes : scratch;
    more = expander.begin_chunk(other);
    for (int64_t p = 0; p < panels; p += 2) {
      const int from = more ? int(kRows * p / panels) : 0;
      const int until = more ? int(panels - p <= 2 ? kRows : kRows * (p + 2) / panels) : 0;
      char* place = sums + p * kRows * 64;
      if (panels - p > 1)
        chunk_times_panels<Cell, 2>(s, output, chunk, p, place, expander, from, until);
      else chunk_times_panels<Cell, 1>(s, output, chunk, p, place, expander, from, until);
    }
    chunk.a = other;
    chunk.step += chunk.steps;
    if (chunk.last) {
      chunk.step = 0;
      chunk.n += kRows;
    }
  }
  return true;
}

// Whether the kernels of few rows are faster; with short K the third panel costs them more than it does here.
bool few(const BitmapBlock& s) {
  constexpr int64_t kShort = 16 * kTileBytes;
  return s.cols > 0 || s.rows <= (s.panel_bytes < kShort ? 2 : kBitmapFewPanels) * kSparseM;
}

}  // namespace

bool bitmap_block_bf16_amx(const BitmapBlock& s, const SparseOutput& output) {
  return few(s) ? bitmap_few_bf16_amx(s, output) : block<Bf16>(s, output);
}
bool bitmap_block_int8_amx(const BitmapBlock& s, const SparseOutput& output) {
  return few(s) ? bitmap_few_int8_amx(s, output) : block<Int8>(s, output);
}

}  // namespace trimtab
