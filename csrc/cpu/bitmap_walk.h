// Float weights one by one: w broadcast times 16 m of each of up to eight panels of x, for the kept k alone.
// On any vector type V; internal linkage: included once an instruction set.
//
//   for a tile of rows n:  for 64 k, a word of bits:  for n of the tile:
//     sums[n][panel][16] += w * x[k][panel][16]  for every bit k
//
//   Per kept weight: one load and one fma a vector, and eight instructions to find k and w. The loads set the
//   pace if the rest stays below six micro-operations a cycle; ahead of the loads it also hides most of what
//   the end of a row's bits costs, which cannot be predicted. So 64 k of eight panels are turned straight into
//   L1 (32 KiB), side by side, where a weight's vectors follow each other, for each tile anew: panels of all of
//   x in memory would cost more than they save. The sums of a tile (256 KiB) pass through L2 in order.
//
//   With one or two panels that end is more than all else: there the rows come in order of their bits, so that
//   the loop runs as often as it did for the row before (at 90 % 1.1 x faster; more panels gain nothing).
#pragma once
#include <cstring>

#include "cpu/bitmap_kernels.h"
#include "cpu/scratch.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int kWalkRows = kBitmapWalkRows;  // of a tile
constexpr int kSortedLeast = 200;  // fewer rows are not worth putting in order
constexpr int kRowsAhead = 8;  // whose bits and values are asked for

// Whether rows come in order of their bits. Their sums are met in any order then, so they stay in L1.
constexpr bool walk_sorts(int panels) { return panels <= 2; }
constexpr int walk_tile(int panels) { return walk_sorts(panels) ? kWalkRows / panels : kWalkRows; }

struct WalkScratch {
  float* sums;  // [kWalkRows][panels][16]
  float* piece;  // [64 k][panels][16] of x
  const void** next;  // [kWalkRows + kRowsAhead] each row's values from here on
  uint64_t* words;  // [kWalkRows]
  uint16_t* order;  // [kWalkRows + kRowsAhead]

  bool take(int panels) {
    Carver carve;
    for (int cut = 0; cut < 2; ++cut) {
      if (cut == 1 && !carve.take(Scratch::kRow)) return false;
      carve(sums, int64_t(kWalkRows) * panels * kSparseM);
      carve(piece, int64_t(64) * panels * kSparseM);
      carve(next, int64_t(kWalkRows + kRowsAhead));
      carve(words, int64_t(kWalkRows));
      carve(order, int64_t(kWalkRows + kRowsAhead));
    }
    return true;
  }
};

// The values of one word of bits as floats: in place, or widened into `to` [64].
template <class V>
TT_INLINE const float* widened(const float* values, int, float*) {
  return values;
}
template <class V, class T>
TT_INLINE const float* widened(const T* values, int count, float* to) {
  int i = 0;
  for (; i + V::lanes <= count; i += V::lanes) V::load(values + i).store(to + i);
  if (i < count) V::load_n(values + i, count - i).store(to + i);
  return to;
}

// Where the first k of a word stands in x [64 k][kPanels][16].
template <int kPanels>
TT_INLINE const float* place_of(uint64_t word, const float* x) {
  const float* at = x + uint64_t(unsigned(__builtin_ctzll(word))) * (kPanels * kSparseM);
  // In one register: base and index would make two micro-operations of each fma (measured: 1.2 x the time).
  __asm__("" : "+r"(at));
  return at;
}

// sums [kPanels][16], from zeros at the first word, += the kept weights of one word times x [64 k][kPanels][16]
// at: the word's place_of
template <class V, int kPanels>
TT_INLINE void walk_word(uint64_t word, const float* at, const float* w, const float* x, bool first,
                         float* sums) {
  constexpr int kVectors = kPanels * kSparseM / V::lanes;
  V sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = first ? V(0.0f) : V::load(sums + v * V::lanes);
  for (; word != 0; ++w) {
    const V weight(*w);
    const float* now = at;
    word &= word - 1;
    at = place_of<kPanels>(word, x);  // of no word: not read
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(weight, V::load(now + v * V::lanes), sum[v]);
  }
  for (int v = 0; v < kVectors; ++v) sum[v].store(sums + v * V::lanes);
}

// 64 k of the rows of x, from k on -> piece [64][kPanels][16]; what lies past K is neither read nor written
template <class Value, int kPanels>
void fill_piece(const BitmapBlock& s, int64_t k, const SparseLanes& lanes, float* piece) {
  const Value* x = static_cast<const Value*>(s.x) + k;
  const int count = int(s.K - k < 64 ? s.K - k : 64);
  for (int p = 0; p < kPanels; ++p, x += kSparseM * s.x_stride) {
    const int64_t rows = s.rows - p * kSparseM;
    lanes.fill_part(x, s.weight.dtype, s.x_stride, int(rows < kSparseM ? rows : kSparseM), count,
                    piece + p * kSparseM, kPanels * kSparseM);
  }
}

// The words of `rows` rows, and the rows in rising order of the bits in them.
inline void sort_rows(const uint8_t* bits, int64_t row_bytes, int rows,
                      const WalkScratch& scratch) {
  uint16_t start[66] = {};  // where the rows with so many bits begin; one further on while counted
  uint8_t counts[kWalkRows];
  for (int row = 0; row < rows; ++row, bits += row_bytes) {
    std::memcpy(scratch.words + row, bits, 8);
    counts[row] = uint8_t(__builtin_popcountll(scratch.words[row]));
    ++start[counts[row] + 1];
  }
  for (int count = 1; count <= 64; ++count)
    start[count] = uint16_t(start[count] + start[count - 1]);
  for (int row = 0; row < rows; ++row) scratch.order[start[counts[row]]++] = uint16_t(row);
}

// sums [rows][kPanels][16] += the kept weights of one word of each row, bits row_bytes apart, times piece;
// next [rows + kRowsAhead]: each row's values from this word on, then behind it
//
// All of the next row that its first fma waits for is loaded before a row's loop, whose end is guessed wrongly
// more often than not. (That, and nothing read again through pointers: 1.06 to 1.09 x.)
template <class V, class Value, int kPanels, bool kSorted>
void walk_rows(const uint8_t* bits, int64_t row_bytes, int rows, const Value** next,
               const uint64_t* words, const uint16_t* order, const float* piece, bool first,
               float* sums) {
  float buffer[64];
  const auto load = [&](int row) __attribute__((always_inline)) {
    uint64_t word;
    std::memcpy(&word, kSorted ? static_cast<const void*>(words + row) : bits, 8);
    return word;
  };
  int row = kSorted ? order[0] : 0;
  uint64_t word = load(row);
  const float* at = place_of<kPanels>(word, piece);
  const Value* from = next[row];
  for (int i = 0; i < rows; ++i) {
    const int row_after = kSorted ? order[i + 1] : row + 1;
    __builtin_prefetch(bits + kRowsAhead * row_bytes + (kSorted ? 8 : 0));
    __builtin_prefetch(next[kSorted ? order[i + kRowsAhead] : i + kRowsAhead]);
    bits += i + 1 < rows ? row_bytes : 0;  // nothing past the last row
    uint64_t word_after = load(row_after);
    const Value* from_after = next[row_after];
    const float* at_after = place_of<kPanels>(word_after, piece);
    __asm__ volatile("" : "+r"(word_after), "+r"(from_after), "+r"(at_after));
    const int count = __builtin_popcountll(word);
    walk_word<V, kPanels>(word, at, widened<V>(from, count, buffer), piece, first,
                          sums + int64_t(row) * (kPanels * kSparseM));
    from += count;
    next[row] = from;
    __builtin_prefetch(from + 64 / sizeof(Value), 0, 2);  // for the next word
    row = row_after, word = word_after, from = from_after, at = at_after;
  }
}

// `rows` rows of the weight from n on, times kPanels panels -> scratch.sums [rows][kPanels][16]
template <class V, class Value, int kPanels>
void walk(const BitmapBlock& s, int64_t n, int rows, const SparseLanes& lanes,
          const WalkScratch& scratch) {
  const Value** next = reinterpret_cast<const Value**>(scratch.next);
  const Value* values = static_cast<const Value*>(s.weight.values);
  for (int row = 0; row < rows; ++row) next[row] = values + s.weight.row_start[n + row];
  for (int i = 0; i < kRowsAhead; ++i) next[rows + i] = next[rows - 1], scratch.order[rows + i] = 0;
  if (s.row_bytes == 0) std::memset(scratch.sums, 0, size_t(rows) * kPanels * kSparseM * 4);
  const uint8_t* bits = s.weight.bits + n * s.row_bytes;
  const bool sorted = walk_sorts(kPanels) && rows >= kSortedLeast;
  const auto walk_word_of_rows = sorted ? walk_rows<V, Value, kPanels, walk_sorts(kPanels)>
                                        : walk_rows<V, Value, kPanels, false>;
  for (int64_t byte = 0; byte < s.row_bytes; byte += 8, bits += 8) {
    if (sorted) sort_rows(bits, s.row_bytes, rows, scratch);
    fill_piece<Value, kPanels>(s, byte * 8, lanes, scratch.piece);
    walk_word_of_rows(bits, s.row_bytes, rows, next, scratch.words, scratch.order, scratch.piece,
                      byte == 0, scratch.sums);
  }
}

template <class V, class Value>
bool walk_block(const BitmapBlock& s, const SparseOutput& output) {
  using Walk = void (*)(const BitmapBlock&, int64_t, int, const SparseLanes&, const WalkScratch&);
  static constexpr Walk kWalks[] = {walk<V, Value, 1>, walk<V, Value, 2>, walk<V, Value, 3>,
                                    walk<V, Value, 4>, walk<V, Value, 5>, walk<V, Value, 6>,
                                    walk<V, Value, 7>, walk<V, Value, 8>};
  const int panels = int((s.rows + kSparseM - 1) / kSparseM);
  WalkScratch scratch;
  if (!scratch.take(panels)) return false;
  const int tile = walk_tile(panels);
  for (int64_t n = s.n_begin; n < s.n_end; n += tile) {
    const int tile_rows = int(s.n_end - n < tile ? s.n_end - n : tile);
    kWalks[panels - 1](s, n, tile_rows, *output.lanes, scratch);
    for (int p = 0; p < panels; ++p) {
      const int64_t m = int64_t(p) * kSparseM;
      const int rows = int(s.rows - m < kSparseM ? s.rows - m : kSparseM);
      for (int row = 0; row < tile_rows; row += kSparseTileN)
        sparse_store(output, scratch.sums + (row * panels + p) * kSparseM, panels * kSparseM, m,
                     rows, n + row,
                     tile_rows - row < kSparseTileN ? tile_rows - row : kSparseTileN);
    }
  }
  return true;
}

}  // namespace
}  // namespace trimtab
