// Activation panels: how one row's int8 values stand in a kernel's cells (int8_kernels.h), and the
// fillers made of it. Included by the <op>_<isa>.cpp files alone; everything here has internal linkage.
#pragma once
#include <cstring>

#include "cpu/int8_kernels.h"

namespace trimtab {
namespace {

enum class Cell {
  kInt8,  // the value: AMX, scalar
  kUint8,  // value + 128: vpdpbusd takes unsigned by signed
  kInt16,  // widened, k in the order 0 2 1 3: vpmaddwd pairs (k0,k2) and (k1,k3)
};

template <Cell kCell>
constexpr int cell_bytes() {
  return kCell == Cell::kInt16 ? 2 : 1;
}

// Writes 64 values of one row into one panel step.
template <Cell kCell>
inline void store_step(const int8_t* values, void* cells) {
  if constexpr (kCell == Cell::kInt8) {
    std::memcpy(cells, values, kStepK);
  } else if constexpr (kCell == Cell::kUint8) {
    uint8_t* out = static_cast<uint8_t*>(cells);
    for (int k = 0; k < kStepK; ++k) out[k] = uint8_t(values[k]) ^ 0x80;
  } else {
    int16_t* out = static_cast<int16_t*>(cells);
    for (int k = 0; k < kStepK; k += 4) {
      out[k] = values[k];
      out[k + 1] = values[k + 2];
      out[k + 2] = values[k + 1];
      out[k + 3] = values[k + 3];
    }
  }
}

// a [rows, K] int8 -> panel
template <int kMr, Cell kCell>
void pack_a(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  constexpr int64_t kRowBytes = kStepK * cell_bytes<kCell>();
  for (int row = 0; row < rows; ++row) {
    const int8_t* from = a + row * a_stride;
    char* to = static_cast<char*>(panel) + row * kRowBytes;
    int64_t k = 0;
    for (; k + kStepK <= K; k += kStepK, to += kMr * kRowBytes) store_step<kCell>(from + k, to);
    if (k < K) {
      int8_t last[kStepK] = {};
      std::memcpy(last, from + k, size_t(K - k));
      store_step<kCell>(last, to);
    }
  }
}

// Calls tile(panel's first row, rows, first column, columns) over a block, columns outside: a column
// tile of the weight stays in L1 while the row panels, which live in L2, pass by.
template <int kTileN, class Tile>
inline void for_each_tile(const Int8Block& block, Tile&& tile) {
  for (int64_t n = block.n_begin; n < block.n_end; n += kTileN) {
    const int cols = int(block.n_end - n < kTileN ? block.n_end - n : kTileN);
    for (int64_t m = 0; m < block.rows; m += block.mr) {
      const int rows = int(block.rows - m < block.mr ? block.rows - m : block.mr);
      tile(m, rows, n, cols);
    }
  }
}

// Where a tile's epilogue writes.
inline char* tile_out(const Int8Block& block, int64_t m, int64_t n) {
  return block.out + (m * block.out_stride + n) * block.out_size;
}

}  // namespace
}  // namespace trimtab
