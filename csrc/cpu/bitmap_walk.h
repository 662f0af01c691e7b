// Float weights one by one: w broadcast times 16 m of each of up to eight panels of x, for the kept k alone.
// On any vector type V; internal linkage: included once an instruction set.
//
//   for a tile of rows n:  for 64 k, a word of bits:  for n of the tile:
//     sums[n][panel][16] += w * x[k][panel][16]  for every bit k
//
//   Per kept weight: one load and one fma a vector, and some six instructions to find k and w. The panels
//   stand side by side, so that 64 k of eight of them are one piece of 32 KiB that stays in L1 while the tile
//   passes over it; meanwhile the next piece is asked for, a line or two a row. The sums of a tile (256 KiB)
//   pass through L2 in order. x is read once a tile, each weight once for eight panels.
//
//   The end of a row's bits cannot be predicted, which costs some 25 cycles. Up to four vectors of sums that
//   is more than all else: there the rows come in order of their bits, so that the loop runs as often as it
//   did for the row before (64 rows of x, 4096 x 4096 at 90 %: 1.3 x faster; with eight panels it loses).
#pragma once
#include <cstring>

#include "cpu/bitmap_kernels.h"
#include "cpu/scratch.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int kWalkRows = 512;  // of a tile
constexpr int kSortedRows = 256;  // of a tile in order of its bits: its sums are met in any order
constexpr int kRowsAhead = 8;  // whose bits and values are asked for

template <class V>
constexpr bool walk_sorts(int panels) {
  return panels * (kSparseM / V::lanes) <= 4;
}

struct WalkScratch {
  float* sums;  // [kWalkRows][panels][16]
  const void** next;  // [kWalkRows] each row's values from here on
  uint64_t* words;  // [kSortedRows]
  uint16_t* order;  // [kSortedRows]

  bool take(int panels) {
    Carver carve;
    for (int cut = 0; cut < 2; ++cut) {
      if (cut == 1 && !carve.take(Scratch::kRow)) return false;
      carve(sums, int64_t(kWalkRows) * panels * kSparseM);
      carve(next, int64_t(kWalkRows));
      carve(words, int64_t(kSortedRows));
      carve(order, int64_t(kSortedRows));
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

// sums [kPanels][16], from zeros at the first word, += the kept weights of one word times x [64][kPanels][16]
template <class V, int kPanels>
TT_INLINE void walk_word(uint64_t word, const float* w, const float* x, bool first, float* sums) {
  constexpr int kVectors = kPanels * kSparseM / V::lanes;
  V sum[kVectors];
  if (first) {
    for (int v = 0; v < kVectors; ++v) sum[v] = V(0.0f);
  } else {
    for (int v = 0; v < kVectors; ++v) sum[v] = V::load(sums + v * V::lanes);
  }
  for (; word != 0; word &= word - 1, ++w) {
    const float* at = x + uint64_t(unsigned(__builtin_ctzll(word))) * (kPanels * kSparseM);
    const V weight(*w);
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(weight, V::load(at + v * V::lanes), sum[v]);
  }
  for (int v = 0; v < kVectors; ++v) sum[v].store(sums + v * V::lanes);
}

// The words of `rows` rows, and the rows in rising order of the bits in them.
inline void sort_rows(const uint8_t* bits, int64_t row_bytes, int rows,
                      const WalkScratch& scratch) {
  uint16_t start[66] =
      {};  // of the rows with that many bits; one further on while they are counted
  uint8_t counts[kSortedRows];
  for (int row = 0; row < rows; ++row, bits += row_bytes) {
    std::memcpy(scratch.words + row, bits, 8);
    counts[row] = uint8_t(__builtin_popcountll(scratch.words[row]));
    ++start[counts[row] + 1];
  }
  for (int count = 1; count <= 64; ++count)
    start[count] = uint16_t(start[count] + start[count - 1]);
  for (int row = 0; row < rows; ++row) scratch.order[start[counts[row]]++] = uint16_t(row);
}

// `rows` rows of the weight from n on, times x [K][kPanels][16] -> sums [rows][kPanels][16]
template <class V, class Value, int kPanels>
void walk(const BitmapBlock& s, int64_t n, int rows, const float* x, const WalkScratch& scratch) {
  constexpr bool kSorted = walk_sorts<V>(kPanels);
  constexpr int kPiece = 64 * kPanels;  // lines of 64 bytes
  const int lines_a_row = (kPiece + rows - 1) / rows;
  const Value** next = reinterpret_cast<const Value**>(scratch.next);
  for (int row = 0; row < rows; ++row)
    next[row] = static_cast<const Value*>(s.weight.values) + s.weight.row_start[n + row];
  if (s.row_bytes == 0) std::memset(scratch.sums, 0, size_t(rows) * kPanels * kSparseM * 4);
  float buffer[64];
  const uint8_t* bits = s.weight.bits + n * s.row_bytes;
  for (int64_t byte = 0; byte < s.row_bytes; byte += 8, bits += 8, x += kPiece * 16) {
    if (kSorted) sort_rows(bits, s.row_bytes, rows, scratch);
    const char* x_next = reinterpret_cast<const char*>(x + kPiece * 16);
    for (int i = 0; i < rows; ++i) {
      const int ahead = i + kRowsAhead < rows ? i + kRowsAhead : i;
      const int row = kSorted ? scratch.order[i] : i;
      uint64_t word;
      std::memcpy(&word,
                  kSorted ? reinterpret_cast<const uint8_t*>(scratch.words + row)
                          : bits + row * s.row_bytes,
                  8);
      __builtin_prefetch(bits + ahead * s.row_bytes + (kSorted ? 8 : 0));
      __builtin_prefetch(next[kSorted ? scratch.order[ahead] : ahead]);
      for (int line = i * lines_a_row; line < kPiece && line < (i + 1) * lines_a_row; ++line)
        __builtin_prefetch(x_next + line * 64, 0, 2);
      const int count = __builtin_popcountll(word);
      walk_word<V, kPanels>(word, widened<V>(next[row], count, buffer), x, byte == 0,
                            scratch.sums + row * kPanels * kSparseM);
      next[row] += count;
      __builtin_prefetch(next[row] + 64 / sizeof(Value), 0, 2);  // for the next word
    }
  }
}

template <class V, class Value>
bool walk_block(const BitmapBlock& s, const SparseOutput& output) {
  using Walk = void (*)(const BitmapBlock&, int64_t, int, const float*, const WalkScratch&);
  static constexpr Walk kWalks[] = {walk<V, Value, 1>, walk<V, Value, 2>, walk<V, Value, 3>,
                                    walk<V, Value, 4>, walk<V, Value, 5>, walk<V, Value, 6>,
                                    walk<V, Value, 7>, walk<V, Value, 8>};
  const int64_t panels = (s.rows + kSparseM - 1) / kSparseM;
  WalkScratch scratch;
  if (!scratch.take(s.side_by_side)) return false;
  const int tile = walk_sorts<V>(s.side_by_side) ? kSortedRows : kWalkRows;
  for (int64_t n = s.n_begin; n < s.n_end; n += tile) {
    const int tile_rows = int(s.n_end - n < tile ? s.n_end - n : tile);
    for (int64_t p = 0; p < panels; p += s.side_by_side) {
      const int group = int(panels - p < s.side_by_side ? panels - p : s.side_by_side);
      kWalks[group - 1](s, n, tile_rows, static_cast<const float*>(s.x) + p * s.panel_bytes / 4,
                        scratch);
      for (int i = 0; i < group; ++i) {
        const int64_t m = (p + i) * kSparseM;
        const int rows = int(s.rows - m < kSparseM ? s.rows - m : kSparseM);
        for (int row = 0; row < tile_rows; row += kSparseTileN)
          sparse_store(output, scratch.sums + (row * group + i) * kSparseM, group * kSparseM, m,
                       rows, n + row,
                       tile_rows - row < kSparseTileN ? tile_rows - row : kSparseTileN);
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace trimtab
