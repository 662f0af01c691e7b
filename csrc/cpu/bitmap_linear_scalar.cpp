// Portable C++, and the plain statement of what the other kernels compute: a row's kept weights, one after
// the other, times 16 rows of x each.
#include <cstring>

#include "cpu/bitmap_kernels.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

inline float value_of(float w) { return w; }
inline float value_of(bf16 w) { return to_float(w); }
inline float value_of(fp16 w) { return to_float(w); }
inline int32_t value_of(int8_t w) { return w; }

// body(k) for every kept k of a row, in rising order
template <class Body>
inline void for_each_kept(const uint8_t* bits, int64_t row_bytes, Body&& body) {
  for (int64_t byte = 0; byte < row_bytes; byte += 8) {
    uint64_t word;
    std::memcpy(&word, bits + byte, 8);
    for (; word != 0; word &= word - 1) body(byte * 8 + __builtin_ctzll(word));
  }
}

// Cell: float, with e = 1 in a dword of the panel, or int8_t with e = 4.
template <class Sum, class Cell, class Value>
void row_times_panel(const uint8_t* bits, int64_t row_bytes, const Value* values, const Cell* panel,
                     Sum* sums) {
  constexpr int kEach = 4 / int(sizeof(Cell));
  for (int m = 0; m < kSparseM; ++m) sums[m] = 0;
  for_each_kept(bits, row_bytes, [&](int64_t k) {
    const Cell* x = panel + k / kEach * kSparseM * kEach + k % kEach;
    const Sum w = value_of(*values++);
    for (int m = 0; m < kSparseM; ++m) sums[m] += w * x[m * kEach];
  });
}

template <class Sum, class Cell, class Value>
bool block(const BitmapBlock& s, const SparseOutput& output) {
  Sum sums[kSparseTileN * kSparseM] = {};
  for (int64_t n = s.n_begin; n < s.n_end; n += kSparseTileN) {
    const int cols = int(s.n_end - n < kSparseTileN ? s.n_end - n : kSparseTileN);
    for (int64_t m = 0; m < s.rows; m += kSparseM) {
      const char* panel = static_cast<const char*>(s.x) + m / kSparseM * s.panel_bytes;
      for (int col = 0; col < cols; ++col)
        row_times_panel(s.weight.bits + (n + col) * s.row_bytes, s.row_bytes,
                        static_cast<const Value*>(s.weight.values) + s.weight.row_start[n + col],
                        reinterpret_cast<const Cell*>(panel), sums + col * kSparseM);
      const int rows = int(s.rows - m < kSparseM ? s.rows - m : kSparseM);
      sparse_store(output, sums, kSparseM, m, rows, n, cols);
    }
  }
  return true;
}

}  // namespace

bool bitmap_block_f32_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<float, float, float>(s, output);
}
bool bitmap_block_bf16_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<float, float, bf16>(s, output);
}
bool bitmap_block_f16_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<float, float, fp16>(s, output);
}
bool bitmap_block_int8_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<int32_t, int8_t, int8_t>(s, output);
}

}  // namespace trimtab
