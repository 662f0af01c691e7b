// One row of silu_mul_quantize_int8 on any vector type. Internal linkage: included once an instruction
// set.
#pragma once
#include "cpu/quantize_int8.h"
#include "math/activation.h"

namespace trimtab {

// gate, up [K] of dtype;  y: scratch of K floats
using SiluMulRowFn = void (*)(const void* gate, const void* up, tt_dtype dtype, int64_t K, float* y,
                              int8_t* q, float* scale);
void silu_mul_row_scalar(const void*, const void*, tt_dtype, int64_t, float*, int8_t*, float*);
void silu_mul_row_avx2(const void*, const void*, tt_dtype, int64_t, float*, int8_t*, float*);
void silu_mul_row_avx512(const void*, const void*, tt_dtype, int64_t, float*, int8_t*, float*);

namespace {

template <class V, class T>
void silu_mul_row(const void* gate_row, const void* up_row, int64_t K, float* y, int8_t* q,
                  float* scale) {
  const T *gate = static_cast<const T*>(gate_row), *up = static_cast<const T*>(up_row);
  int64_t k = 0;
  for (; k + V::lanes <= K; k += V::lanes) (silu(V::load(gate + k)) * V::load(up + k)).store(y + k);
  const int rest = int(K - k);
  if (rest > 0) (silu(V::load_n(gate + k, rest)) * V::load_n(up + k, rest)).store_n(y + k, rest);
  quantize_row<V>(y, K, q, scale);
}

template <class V>
void silu_mul_row(const void* gate, const void* up, tt_dtype dtype, int64_t K, float* y, int8_t* q,
                  float* scale) {
  switch (dtype) {
    case TT_BF16: return silu_mul_row<V, bf16>(gate, up, K, y, q, scale);
    case TT_F16: return silu_mul_row<V, fp16>(gate, up, K, y, q, scale);
    default: return silu_mul_row<V, float>(gate, up, K, y, q, scale);
  }
}

}  // namespace
}  // namespace trimtab
