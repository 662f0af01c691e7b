// The vector loops of int8_conv2d on any vector type. Internal linkage: included once an instruction
// set.
#pragma once
#include "cpu/int8_conv2d.h"
#include "cpu/quantize_int8.h"

namespace trimtab {
namespace {

template <class V>
float absmax(const void* x, tt_dtype dtype, int64_t n) {
  switch (dtype) {
    case TT_BF16: return row_absmax<V>(static_cast<const bf16*>(x), n);
    case TT_F16: return row_absmax<V>(static_cast<const fp16*>(x), n);
    default: return row_absmax<V>(static_cast<const float*>(x), n);
  }
}

template <class V, class T>
void quantize_values(const T* x, int64_t n, float inverse, int8_t* q) {
  int64_t k = 0;
  for (; k + V::lanes <= n; k += V::lanes) store_int8(q + k, V::load(x + k) * V(inverse));
  if (k < n) store_int8_n(q + k, V::load_n(x + k, int(n - k)) * V(inverse), int(n - k));
}

template <class V>
void quantize(const void* x, tt_dtype dtype, int64_t n, float inverse, int8_t* q) {
  if (inverse == 0.0f) {  // zeros, NaN or Inf: x * inverse could be NaN
    std::memset(q, 0, size_t(n));
    return;
  }
  switch (dtype) {
    case TT_BF16: return quantize_values<V>(static_cast<const bf16*>(x), n, inverse, q);
    case TT_F16: return quantize_values<V>(static_cast<const fp16*>(x), n, inverse, q);
    default: return quantize_values<V>(static_cast<const float*>(x), n, inverse, q);
  }
}

// Vectors of the compiler's own kind; it splits them into registers of the instruction set.
typedef int8_t Bytes32 __attribute__((vector_size(32)));
typedef int16_t Halves16 __attribute__((vector_size(32)));
typedef int16_t Halves32 __attribute__((vector_size(64)));
typedef int32_t Words16 __attribute__((vector_size(64)));

// Two taps at a time: |x| <= 127 and |w| <= 128, so the sum of two products fits int16 exactly
// (2 * 127 * 128 = 32512), and only then is widened.
inline void depthwise(const DepthwiseRun& run) {
  for (int64_t p = 0; p < run.pixels; ++p) {
    const int8_t* x = run.x + p * run.x_stride;
    Words16 low = {}, high = {};
    for (int64_t t = 0; t < run.taps; t += 2) {
      Bytes32 x0, x1;
      Halves32 w0, w1;
      std::memcpy(&x0, x + run.offset[t], sizeof x0);
      std::memcpy(&x1, x + run.offset[t + 1], sizeof x1);
      std::memcpy(&w0, run.weight + t * kDepthwiseChannels, sizeof w0);
      std::memcpy(&w1, run.weight + (t + 1) * kDepthwiseChannels, sizeof w1);
      const Halves32 sum =
          __builtin_convertvector(x0, Halves32) * w0 + __builtin_convertvector(x1, Halves32) * w1;
      Halves16 half[2];
      std::memcpy(half, &sum, sizeof sum);
      low += __builtin_convertvector(half[0], Words16);
      high += __builtin_convertvector(half[1], Words16);
    }
    std::memcpy(run.acc + p * kMaxTileN, &low, sizeof low);
    std::memcpy(run.acc + p * kMaxTileN + 16, &high, sizeof high);
  }
}

}  // namespace
}  // namespace trimtab
