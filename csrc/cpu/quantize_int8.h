// Row quantization on any vector type: into a plain row, or into a kernel's activation panel.
// Internal linkage: included once an instruction set.
#pragma once
#include "cpu/bits_max.h"
#include "cpu/int8_panel.h"
#include "math/quantize.h"

namespace trimtab {
namespace {

// The largest bit pattern of |x[k]|; four independent chains hide the latency of the maximum.
template <class V, class T>
float row_absmax(const T* x, int64_t K) {
  V most[4] = {V(0.0f), V(0.0f), V(0.0f), V(0.0f)};
  int64_t k = 0;
  for (; k + 4 * V::lanes <= K; k += 4 * V::lanes)
    for (int i = 0; i < 4; ++i) most[i] = bits_max(most[i], abs(V::load(x + k + i * V::lanes)));
  for (; k < K; k += V::lanes) {
    const int rest = int(K - k < V::lanes ? K - k : V::lanes);
    most[0] = bits_max(most[0], abs(V::load_n(x + k, rest)));
  }
  const V all = bits_max(bits_max(most[0], most[1]), bits_max(most[2], most[3]));
  float lanes[V::lanes];
  all.store(lanes);
  uint32_t bits = 0;
  for (int i = 0; i < V::lanes; ++i)
    bits = float_bits(lanes[i]) > bits ? float_bits(lanes[i]) : bits;
  return float_from_bits(bits);
}

// 64 values, or the first `count` of them and zeros.
template <class V, class T>
inline void quantize_step(const T* x, int count, float inverse, int8_t* q) {
  if (count < kStepK) std::memset(q, 0, kStepK);
  int k = 0;
  for (; k + V::lanes <= count; k += V::lanes) store_int8(q + k, V::load(x + k) * V(inverse));
  if (k < count) store_int8_n(q + k, V::load_n(x + k, count - k) * V(inverse), count - k);
}

template <class V, class T>
void quantize_row(const T* x, int64_t K, int8_t* q, float* scale) {
  const RowScale row = row_scale(row_absmax<V>(x, K));
  *scale = row.scale;
  if (row.inverse == 0.0f) {  // zeros, NaN or Inf: x * inverse could be NaN
    std::memset(q, 0, size_t(K));
    return;
  }
  const V inverse(row.inverse);
  int64_t k = 0;
  for (; k + V::lanes <= K; k += V::lanes) store_int8(q + k, V::load(x + k) * inverse);
  if (k < K) store_int8_n(q + k, V::load_n(x + k, int(K - k)) * inverse, int(K - k));
}

template <class V, int kMr, Cell kCell, class T>
void quantize_panel(const T* x, int64_t x_stride, int rows, int64_t K, char* panel, float* scale) {
  constexpr int64_t kRowBytes = kStepK * cell_bytes<kCell>();
  for (int r = 0; r < rows; ++r, x += x_stride) {
    const RowScale row = row_scale(row_absmax<V>(x, K));
    scale[r] = row.scale;
    char* cells = panel + r * kRowBytes;
    alignas(64) int8_t q[kStepK] = {};
    for (int64_t k = 0; k < K; k += kStepK, cells += kMr * kRowBytes) {
      if (row.inverse != 0.0f)
        quantize_step<V>(x + k, int(K - k < kStepK ? K - k : kStepK), row.inverse, q);
      store_step<kCell>(q, cells);
    }
  }
}

template <class V, int kMr, Cell kCell>
void quantize_a(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K, void* panel,
                float* scale) {
  char* to = static_cast<char*>(panel);
  switch (dtype) {
    case TT_BF16:
      return quantize_panel<V, kMr, kCell>(static_cast<const bf16*>(x), x_stride, rows, K, to,
                                           scale);
    case TT_F16:
      return quantize_panel<V, kMr, kCell>(static_cast<const fp16*>(x), x_stride, rows, K, to,
                                           scale);
    default:
      return quantize_panel<V, kMr, kCell>(static_cast<const float*>(x), x_stride, rows, K, to,
                                           scale);
  }
}

template <class V>
void quantize_row(const void* x, tt_dtype dtype, int64_t K, int8_t* q, float* scale) {
  switch (dtype) {
    case TT_BF16: return quantize_row<V>(static_cast<const bf16*>(x), K, q, scale);
    case TT_F16: return quantize_row<V>(static_cast<const fp16*>(x), K, q, scale);
    default: return quantize_row<V>(static_cast<const float*>(x), K, q, scale);
  }
}

}  // namespace
}  // namespace trimtab
