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

// body(k) for every kept k of a row, in rising order
template <class Body>
inline void for_each_kept(const uint8_t* bits, int64_t row_bytes, Body&& body) {
  for (int64_t byte = 0; byte < row_bytes; byte += 8) {
    uint64_t word;
    std::memcpy(&word, bits + byte, 8);
    for (; word != 0; word &= word - 1) body(byte * 8 + __builtin_ctzll(word));
  }
}

template <class Value>
void row_times_panel(const uint8_t* bits, int64_t row_bytes, const Value* values,
                     const float* panel, float* sums) {
  for (int m = 0; m < kSparseM; ++m) sums[m] = 0;
  for_each_kept(bits, row_bytes, [&](int64_t k) {
    const float* x = panel + k * kSparseM;
    const float w = value_of(*values++);
    for (int m = 0; m < kSparseM; ++m) sums[m] += w * x[m];
  });
}

template <class Value>
bool block(const BitmapBlock& s, const SparseOutput& output) {
  float sums[kSparseTileN * kSparseM] = {};
  for (int64_t n = s.n_begin; n < s.n_end; n += kSparseTileN) {
    const int cols = int(s.n_end - n < kSparseTileN ? s.n_end - n : kSparseTileN);
    for (int64_t m = 0; m < s.rows; m += kSparseM) {
      const char* panel = static_cast<const char*>(s.x) + m / kSparseM * s.panel_bytes;
      for (int col = 0; col < cols; ++col)
        row_times_panel(s.weight.bits + (n + col) * s.row_bytes, s.row_bytes,
                        static_cast<const Value*>(s.weight.values) + s.weight.row_start[n + col],
                        reinterpret_cast<const float*>(panel), sums + col * kSparseM);
      const int rows = int(s.rows - m < kSparseM ? s.rows - m : kSparseM);
      sparse_store(output, sums, kSparseM, m, rows, n, cols);
    }
  }
  return true;
}

}  // namespace

bool bitmap_block_f32_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<float>(s, output);
}
bool bitmap_block_bf16_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<bf16>(s, output);
}
bool bitmap_block_f16_scalar(const BitmapBlock& s, const SparseOutput& output) {
  return block<fp16>(s, output);
}
const int8_t* bitmap_expand_scalar(uint64_t word, const int8_t* values, int8_t* to) {
  std::memset(to, 0, 64);
  for (; word != 0; word &= word - 1) to[__builtin_ctzll(word)] = *values++;
  return values;
}

}  // namespace trimtab
