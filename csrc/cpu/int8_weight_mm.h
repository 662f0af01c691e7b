// int8_weight_mm on any vector type: the tile, the panel filler and the epilogue. Each instruction set
// brings L, its lanes:
//
//   F                     a register of L::lanes floats;  V: the same as F32x1, F32x8 or F32x16
//   Codes                 L::lanes columns by 4 k of the packed weight
//   load_codes(p)         reads them
//   value(codes, j, o)    float(column's k = j) - zero point, exactly;  o = offset(zero points)
//   fma(a, b, c)          one rounding
//
// Internal linkage: included once an instruction set.
#pragma once
#include <cstring>

#include "cpu/int8_kernels.h"
#include "cpu/int8_weight_mm_kernels.h"
#include "math/epilogue.h"
#include "math/f32x1.h"

namespace trimtab {
namespace {

// x [rows, K] -> panel[k / 4][row][k % 4], widened to fp32
template <class V, class T>
void fill_rows(const T* x, int64_t x_stride, int rows, int64_t K, float* panel) {
  constexpr int kChunk = 64;
  for (int row = 0; row < rows; ++row, x += x_stride, panel += 4) {
    float* cell = panel;
    alignas(64) float values[kChunk];
    for (int64_t k = 0; k < K; k += kChunk) {
      const int count = int(K - k < kChunk ? K - k : kChunk);
      int i = 0;
      for (; i + V::lanes <= count; i += V::lanes) V::load(x + k + i).store(values + i);
      if (i < count) V::load_n(x + k + i, count - i).store(values + i);
      for (i = count; i % 4 != 0; ++i) values[i] = 0.0f;
      for (int j = 0; j < count; j += 4, cell += rows * 4) std::memcpy(cell, values + j, 16);
    }
  }
}

template <class V>
void fill_panel(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                float* panel) {
  switch (dtype) {
    case TT_BF16: return fill_rows<V>(static_cast<const bf16*>(x), x_stride, rows, K, panel);
    case TT_F16: return fill_rows<V>(static_cast<const fp16*>(x), x_stride, rows, K, panel);
    default: return fill_rows<V>(static_cast<const float*>(x), x_stride, rows, K, panel);
  }
}

// The zero points of `count` columns as L::offset's floats; beyond `valid` they do not matter.
template <class L>
inline typename L::F zero_offset(const int8_t* zero_point, int valid) {
  if (zero_point == nullptr || valid <= 0) return L::offset(typename L::V(0.0f).v);
  int32_t zero[L::lanes];
  for (int i = 0; i < L::lanes; ++i) zero[i] = i < valid ? zero_point[i] : 0;
  return L::offset(L::V::load(zero).v);
}

// t [kRows][kWeightTileN] = rows of one panel times kPanels weight panels from column n on
template <class L, int kRows, int kPanels>
void tile(const WeightBlock& s, const float* x, int64_t n, int cols, float* t) {
  using F = typename L::F;
  using V = typename L::V;
  constexpr int kPerPanel = int(kPanelN) / L::lanes;
  constexpr int kVectors = kPanels * kPerPanel;
  const int64_t b_panel = packed_panel_bytes(s.K);
  const int8_t* b = s.b + n / kPanelN * b_panel;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) V(0.0f).store(t + r * kWeightTileN + v * L::lanes);

  const float* scale = s.scale + n;
  const int8_t* zero_point = s.zero_point != nullptr ? s.zero_point + n : nullptr;
  for (int64_t k = 0; k < s.K; k += s.group) {
    const int64_t end = s.K - k < s.group ? s.K : k + s.group;
    F offset[kVectors], acc[kRows][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      offset[v] =
          zero_offset<L>(zero_point ? zero_point + v * L::lanes : nullptr, cols - v * L::lanes);
      for (int r = 0; r < kRows; ++r) acc[r][v] = V(0.0f).v;
    }
    const int64_t steps = (end - k + 3) / 4;
    for (int64_t i = 0; i < steps; ++i, b += 64, x += kRows * 4) {
      typename L::Codes codes[kVectors];
      for (int v = 0; v < kVectors; ++v)
        codes[v] = L::load_codes(b + v / kPerPanel * b_panel + v % kPerPanel * L::lanes * 4);
      if (kRows <= 4)  // the weight streams from memory: fetch 1 KiB ahead
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(b + p * b_panel + 1024);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        F weight[kVectors];
        for (int v = 0; v < kVectors; ++v) weight[v] = L::value(codes[v], j, offset[v]);
        for (int r = 0; r < kRows; ++r) {
          const F value = V(x[r * 4 + j]).v;
          for (int v = 0; v < kVectors; ++v) acc[r][v] = L::fma(value, weight[v], acc[r][v]);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const int valid = cols - v * L::lanes;
      if (valid <= 0) break;
      const float* from = scale + v * L::lanes;
      const F by = (valid >= L::lanes ? V::load(from) : V::load_n(from, valid)).v;
      for (int r = 0; r < kRows; ++r) {
        float* sum = t + r * kWeightTileN + v * L::lanes;
        V(L::fma(acc[r][v], by, V::load(sum).v)).store(sum);
      }
    }
    scale += s.N;
    if (zero_point != nullptr) zero_point += s.N;
  }
}

using WeightTileFn = void (*)(const WeightBlock&, const float*, int64_t, int, float*);

// Columns outside: a column tile of the weight stays in cache while the row panels pass by.
// choose(rows, panels) -> the tile function
template <int kTileN, class Choose>
inline void weight_block(const WeightBlock& s, Choose&& choose) {
  alignas(64) float t[kWeightMr * kWeightTileN];
  const int64_t k_padded = round_up(s.K, 4);
  for (int64_t n = s.n_begin; n < s.n_end; n += kTileN) {
    const int cols = int(s.n_end - n < kTileN ? s.n_end - n : kTileN);
    for (int64_t m = 0; m < s.rows; m += s.mr) {
      const int rows = int(s.rows - m < s.mr ? s.rows - m : s.mr);
      choose(rows, (cols + 15) / 16)(s, s.x + m * k_padded, n, cols, t);
      s.epilogue(t, rows, cols, s.bias + n, s.out + (m * s.out_stride + n) * s.out_size,
                 s.out_stride);
    }
  }
}

template <class V, Activation kActivation, class Out>
void weight_epilogue(const float* t, int rows, int cols, const float* bias, void* out,
                     int64_t out_stride) {
  Out* to = static_cast<Out*>(out);
  for (int row = 0; row < rows; ++row, t += kWeightTileN, to += out_stride) {
    int n = 0;
    for (; n + V::lanes <= cols; n += V::lanes)
      activate<kActivation>(V::load(t + n) + V::load(bias + n)).store(to + n);
    if (n < cols) {
      const int rest = cols - n;
      activate<kActivation>(V::load_n(t + n, rest) + V::load_n(bias + n, rest))
          .store_n(to + n, rest);
    }
  }
}

template <class V, Activation kActivation>
WeightEpilogueFn choose_weight_dtype(tt_dtype out_dtype) {
  switch (out_dtype) {
    case TT_BF16: return weight_epilogue<V, kActivation, bf16>;
    case TT_F16: return weight_epilogue<V, kActivation, fp16>;
    default: return weight_epilogue<V, kActivation, float>;
  }
}

template <class V>
WeightEpilogueFn choose_weight_epilogue(tt_activation activation, tt_dtype out_dtype) {
  switch (activation) {
    case TT_ACT_RELU: return choose_weight_dtype<V, Activation::relu>(out_dtype);
    case TT_ACT_GELU: return choose_weight_dtype<V, Activation::gelu>(out_dtype);
    case TT_ACT_GELU_TANH: return choose_weight_dtype<V, Activation::gelu_tanh>(out_dtype);
    case TT_ACT_SILU: return choose_weight_dtype<V, Activation::silu>(out_dtype);
    default: return choose_weight_dtype<V, Activation::none>(out_dtype);
  }
}

}  // namespace
}  // namespace trimtab
