// The panels of sparse_panel.h on any vector type. Each instruction set brings V, its floats, and
// transpose_16x16. Internal linkage: included once an instruction set.
#pragma once
#include <cstring>

#include "cpu/quantize_int8.h"
#include "cpu/sparse_panel.h"

namespace trimtab {
namespace {

// `count` elements of a row -> 64 bytes of cells, zeros beyond
template <class V, PanelCell kCell, class T>
inline void fill_cells(const T* x, int count, float inverse, uint32_t* cells) {
  if constexpr (kCell == PanelCell::kF32) {
    float* to = reinterpret_cast<float*>(cells);
    for (int k = 0; k < 16; k += V::lanes) {
      const int valid = count - k < 0 ? 0 : count - k < V::lanes ? count - k : V::lanes;
      (valid == V::lanes ? V::load(x + k) : V::load_n(x + k, valid)).store(to + k);
    }
  } else if constexpr (kCell == PanelCell::kBf16) {
    if (count == 32) {
      std::memcpy(cells, x, 64);
    } else {
      std::memset(cells, 0, 64);
      std::memcpy(cells, x, size_t(count) * 2);
    }
  } else {
    int8_t* to = reinterpret_cast<int8_t*>(cells);
    if (inverse == 0.0f) std::memset(to, 0, 64);  // zeros, NaN or Inf: x * inverse could be NaN
    else if (count == kStepK) quantize_step<V>(x, kStepK, inverse, to);  // unrolled
    else quantize_step<V>(x, count, inverse, to);
  }
}

template <class V, PanelCell kCell, class T>
void fill_transposed(const T* x, int64_t x_stride, int rows, int64_t K, uint32_t* panel,
                     float* scale) {
  constexpr int kStep = 64 / panel_cell_bytes(kCell);
  constexpr bool kQuantized = kCell == PanelCell::kInt8 || kCell == PanelCell::kUint8;
  float inverse[kSparseM] = {};
  if constexpr (kQuantized) {
    for (int row = 0; row < rows; ++row) {
      const RowScale of = row_scale(row_absmax<V>(x + row * x_stride, K));
      scale[row] = of.scale;
      inverse[row] = of.inverse;
    }
  }
  // Cells that are x itself need no copy before they are turned (bf16, 16 x 1024: 7.1 to 1.0 us).
  constexpr bool kPlain = !kQuantized && panel_cell_bytes(kCell) == sizeof(T);
  const bool plain = kPlain && rows == kSparseM && x_stride * int64_t(sizeof(T)) % 4 == 0;
  const int64_t k_plain = plain ? K / kStep * kStep : 0;
  for (int64_t k = 0; k < k_plain; k += kStep, panel += 256)
    transpose_16x16(reinterpret_cast<const uint32_t*>(x + k), x_stride * int64_t(sizeof(T)) / 4,
                    panel, 16);
  alignas(64) uint32_t cells[kSparseM * 16] = {};
  for (int64_t k = k_plain; k < K; k += kStep, panel += 256) {
    const int count = int(K - k < kStep ? K - k : kStep);
    for (int row = 0; row < rows; ++row)
      fill_cells<V, kCell>(x + row * x_stride + k, count, inverse[row], cells + row * 16);
    transpose_16x16(cells, 16, panel, 16);
    // Not in the cells: their 16-byte stores cannot be forwarded to a 64-byte load, which would wait.
    if constexpr (kCell == PanelCell::kUint8)
      for (int i = 0; i < 256; ++i) panel[i] ^= 0x80808080u;
  }
}

template <class V, class T>
void fill_panel(const T* x, int64_t x_stride, int rows, int64_t K, PanelCell cell, uint32_t* panel,
                float* scale) {
  switch (cell) {
    case PanelCell::kF32:
      return fill_transposed<V, PanelCell::kF32>(x, x_stride, rows, K, panel, scale);
    case PanelCell::kBf16:
      if constexpr (sizeof(T) == 2)
        return fill_transposed<V, PanelCell::kBf16>(x, x_stride, rows, K, panel, scale);
      return;
    case PanelCell::kInt8:
      return fill_transposed<V, PanelCell::kInt8>(x, x_stride, rows, K, panel, scale);
    case PanelCell::kUint8:
      return fill_transposed<V, PanelCell::kUint8>(x, x_stride, rows, K, panel, scale);
  }
}

template <class V>
void fill_sparse_panel(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                       PanelCell cell, void* panel, float* scale) {
  uint32_t* to = static_cast<uint32_t*>(panel);
  switch (dtype) {
    case TT_BF16:
      return fill_panel<V>(static_cast<const bf16*>(x), x_stride, rows, K, cell, to, scale);
    case TT_F16:
      return fill_panel<V>(static_cast<const fp16*>(x), x_stride, rows, K, cell, to, scale);
    default: return fill_panel<V>(static_cast<const float*>(x), x_stride, rows, K, cell, to, scale);
  }
}

// The next part is asked for too: the shuffles set the pace, and a prefetch a row is hidden by them.
template <class V, class T>
void fill_part(const T* x, int64_t x_stride, int rows, int count, float* to, int64_t to_stride) {
  const bool plain = sizeof(T) == 4 && rows == kSparseM;
  alignas(64) uint32_t cells[kSparseM * 16] = {};
  for (int k = 0; k < count; k += 16, x += 16, to += 16 * to_stride) {
    for (int row = 0; row < rows; ++row) __builtin_prefetch(x + row * x_stride + 64, 0, 2);
    const bool whole = plain && count - k >= 16;
    for (int row = 0; row < rows && !whole; ++row)
      fill_cells<V, PanelCell::kF32>(x + row * x_stride, count - k < 16 ? count - k : 16, 0.0f,
                                     cells + row * 16);
    transpose_16x16(whole ? reinterpret_cast<const uint32_t*>(x) : cells, whole ? x_stride : 16,
                    reinterpret_cast<uint32_t*>(to), to_stride);
  }
}

template <class V>
void fill_part(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int count, float* to,
               int64_t to_stride) {
  switch (dtype) {
    case TT_BF16:
      return fill_part<V>(static_cast<const bf16*>(x), x_stride, rows, count, to, to_stride);
    case TT_F16:
      return fill_part<V>(static_cast<const fp16*>(x), x_stride, rows, count, to, to_stride);
    default:
      return fill_part<V>(static_cast<const float*>(x), x_stride, rows, count, to, to_stride);
  }
}

template <class V, class T>
bool all_finite(const T* x, int64_t x_stride, int64_t rows, int64_t K) {
  bool finite = true;
  for (int64_t row = 0; row < rows && finite; ++row)
    finite = float_bits(row_absmax<V>(x + row * x_stride, K)) < 0x7f800000u;
  return finite;
}

template <class V>
bool all_finite(const void* x, tt_dtype dtype, int64_t x_stride, int64_t rows, int64_t K) {
  switch (dtype) {
    case TT_BF16: return all_finite<V>(static_cast<const bf16*>(x), x_stride, rows, K);
    case TT_F16: return all_finite<V>(static_cast<const fp16*>(x), x_stride, rows, K);
    default: return all_finite<V>(static_cast<const float*>(x), x_stride, rows, K);
  }
}

inline void transpose_dwords(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  transpose_16x16(static_cast<const uint32_t*>(from), from_stride, static_cast<uint32_t*>(to),
                  to_stride);
}

}  // namespace
}  // namespace trimtab
