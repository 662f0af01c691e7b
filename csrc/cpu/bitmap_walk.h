// Float weights one by one: w broadcast times 16 m of each of up to eight panels of x, for the kept k alone.
// On any vector type V; internal linkage: included once an instruction set.
//
//   for 64 k, a word of bits:  for 128 rows n:  sums[n][panel][16] += w * panel[k][16]  for every bit k
//
//   Per kept weight: one load and one fma a vector, two a cycle, and some six instructions to find k and w.
//   Eight sums hide the latency of fma. Eight panels of 64 k (32 KiB) stay in L1; their lines come from L2
//   once for 128 rows, which sets the pace, so the next word's are asked for meanwhile. The sums of those rows
//   (64 KiB) pass through L2 in order. Up to four panels 64 rows are enough, and all stays in L1.
#pragma once
#include <cstring>

#include "cpu/bitmap_kernels.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int kWalkFew = 4;  // panels that 16 registers have room for
constexpr int kWalkMany = 8;
constexpr int kWalkRows = 128;  // of the weight, with more than kWalkFew panels; else kSparseTileN

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

// sums [kPanels][16] += the kept weights of one word times x [kPanels], each at the word's first k
template <class V, int kPanels>
TT_INLINE void walk_word(uint64_t word, const float* w, const float* x, int64_t x_panel,
                         float* sums) {
  constexpr int kVectors = kSparseM / V::lanes;
  V sum[kPanels][kVectors];
  for (int p = 0; p < kPanels; ++p)
    for (int v = 0; v < kVectors; ++v) sum[p][v] = V::load(sums + p * kSparseM + v * V::lanes);
  for (; word != 0; word &= word - 1, ++w) {
    const float* at = x + __builtin_ctzll(word) * kSparseM;
    const V weight(*w);
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVectors; ++v)
        sum[p][v] = fma(weight, V::load(at + p * x_panel + v * V::lanes), sum[p][v]);
  }
  for (int p = 0; p < kPanels; ++p)
    for (int v = 0; v < kVectors; ++v) sum[p][v].store(sums + p * kSparseM + v * V::lanes);
}

// `cols` rows of the weight from n on, times kPanels panels -> sums [cols][kPanels][16]
template <class V, class Value, int kPanels>
void walk(const BitmapBlock& s, int64_t n, int cols, const float* x, float* sums) {
  const Value* next[kWalkRows];
  for (int col = 0; col < cols; ++col)
    next[col] = static_cast<const Value*>(s.weight.values) + s.weight.row_start[n + col];
  std::memset(sums, 0, size_t(cols) * kPanels * kSparseM * 4);
  const int64_t x_panel = s.panel_bytes / 4;
  float buffer[64];
  for (int64_t word_at = 0; word_at < s.row_bytes; word_at += 8, x += 64 * kSparseM) {
    const uint8_t* bits = s.weight.bits + n * s.row_bytes + word_at;
    const float* x_next = x + 64 * kSparseM;
    for (int col = 0; col < cols; ++col, bits += s.row_bytes) {
      uint64_t word;
      std::memcpy(&word, bits, 8);
      const int count = __builtin_popcountll(word);
      walk_word<V, kPanels>(word, widened<V>(next[col], count, buffer), x, x_panel,
                            sums + col * kPanels * kSparseM);
      next[col] += count;
      if (kPanels > kWalkFew && col < 64) {
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(x_next + p * x_panel + col * kSparseM);
      }
    }
  }
}

template <class V, class Value>
bool walk_block(const BitmapBlock& s, const SparseOutput& output) {
  using Walk = void (*)(const BitmapBlock&, int64_t, int, const float*, float*);
  static constexpr Walk kWalks[kWalkMany] = {
      walk<V, Value, 1>, walk<V, Value, 2>, walk<V, Value, 3>, walk<V, Value, 4>,
      walk<V, Value, 5>, walk<V, Value, 6>, walk<V, Value, 7>, walk<V, Value, 8>};
  constexpr int kMost = V::lanes == kSparseM ? kWalkMany : kWalkFew;
  alignas(64) float sums[kWalkRows * kWalkMany * kSparseM];
  const int64_t panels = (s.rows + kSparseM - 1) / kSparseM;
  const int64_t groups = (panels + kMost - 1) / kMost;
  const int wide = int((panels + groups - 1) / groups);  // even groups: 9 panels as 5 + 4
  const int n_step = wide > kWalkFew ? kWalkRows : kSparseTileN;
  for (int64_t n = s.n_begin; n < s.n_end; n += n_step) {
    const int cols = int(s.n_end - n < n_step ? s.n_end - n : n_step);
    for (int64_t p = 0; p < panels; p += wide) {
      const int group = int(panels - p < wide ? panels - p : wide);
      const float* x = static_cast<const float*>(s.x) + p * s.panel_bytes / 4;
      kWalks[group - 1](s, n, cols, x, sums);
      for (int i = 0; i < group; ++i) {
        const int64_t m = (p + i) * kSparseM;
        const int rows = int(s.rows - m < kSparseM ? s.rows - m : kSparseM);
        for (int col = 0; col < cols; col += kSparseTileN)
          sparse_store(output, sums + (col * group + i) * kSparseM, group * kSparseM, m, rows,
                       n + col, cols - col < kSparseTileN ? cols - col : kSparseTileN);
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace trimtab
