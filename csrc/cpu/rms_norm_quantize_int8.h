// One row of rms_norm_quantize_int8 on any vector type (csrc/math/rms_norm.h). Internal linkage: included
// once an instruction set.
#pragma once
#include <algorithm>

#include "cpu/quantize_int8.h"
#include "math/rms_norm.h"

namespace trimtab {

// x [K] of dtype;  weight [K];  y: scratch of K floats
using RmsNormRowFn = void (*)(const void* x, tt_dtype dtype, const float* weight, float eps,
                              int64_t K, float* y, int8_t* q, float* scale);
void rms_norm_row_scalar(const void*, tt_dtype, const float*, float, int64_t, float*, int8_t*,
                         float*);
void rms_norm_row_avx2(const void*, tt_dtype, const float*, float, int64_t, float*, int8_t*,
                       float*);
void rms_norm_row_avx512(const void*, tt_dtype, const float*, float, int64_t, float*, int8_t*,
                         float*);

namespace {

// Sums of `chunks` chunks of eight partials, a multiple of four.
#if defined(__AVX2__)
inline void chunk_sums(const float* partial, int chunks, float* sum) {
  for (int c = 0; c < chunks; c += 4, partial += 4 * kRmsChunk) {
    // hadd adds neighbours within each half of its operands: after two, a half holds the sums of four
    // neighbours of each of the four chunks.
    const __m256 low = _mm256_hadd_ps(_mm256_loadu_ps(partial), _mm256_loadu_ps(partial + 8));
    const __m256 high =
        _mm256_hadd_ps(_mm256_loadu_ps(partial + 16), _mm256_loadu_ps(partial + 24));
    const __m256 four = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(sum + c,
                  _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
}
#else
inline void chunk_sums(const float* partial, int chunks, float* sum) {
  for (int c = 0; c < chunks; ++c) sum[c] = rms_chunk_sum(partial + c * kRmsChunk);
}
#endif

template <class V, class T>
float sum_of_squares(const T* x, int64_t K) {
  alignas(64) float partial[kRmsPartials], chunk[kRmsChunks];
  // Partials that no element reaches stay out: those up to a whole four chunks are zeros.
  const int used = int(std::min<int64_t>((K + 31) / 32 * 32, kRmsPartials));
  for (int i = 0; i < used; i += V::lanes) V(0.0f).store(partial + i);
  for (int64_t begin = 0; begin < K; begin += kRmsPartials) {
    const int count = int(std::min<int64_t>(K - begin, kRmsPartials));
    int i = 0;
    for (; i + V::lanes <= count; i += V::lanes) {
      const V value = V::load(x + begin + i);
      (V::load(partial + i) + value * value).store(partial + i);
    }
    if (i == count) continue;
    const V value = V::load_n(x + begin + i, count - i);
    (V::load_n(partial + i, count - i) + value * value).store_n(partial + i, count - i);
  }
  std::fill(chunk, chunk + kRmsChunks, 0.0f);
  chunk_sums(partial, used / kRmsChunk, chunk);
  int half = kRmsChunks / 2;
  for (; half >= V::lanes; half /= 2)
    for (int i = 0; i < half; i += V::lanes)
      (V::load(chunk + i) + V::load(chunk + i + half)).store(chunk + i);
  for (; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) chunk[i] = (F32x1(chunk[i]) + F32x1(chunk[i + half])).v;
  return chunk[0];
}

template <class V, class T>
void rms_norm_row(const T* x, const float* weight, float eps, int64_t K, float* y, int8_t* q,
                  float* scale) {
  const V r(rms_factor(sum_of_squares<V>(x, K), K, eps));
  int64_t k = 0;
  for (; k + V::lanes <= K; k += V::lanes)
    rms_scaled(V::load(x + k), r, V::load(weight + k)).store(y + k);
  const int rest = int(K - k);
  if (rest > 0)
    rms_scaled(V::load_n(x + k, rest), r, V::load_n(weight + k, rest)).store_n(y + k, rest);
  quantize_row<V>(y, K, q, scale);
}

template <class V>
void rms_norm_row(const void* x, tt_dtype dtype, const float* weight, float eps, int64_t K,
                  float* y, int8_t* q, float* scale) {
  switch (dtype) {
    case TT_BF16: return rms_norm_row<V>(static_cast<const bf16*>(x), weight, eps, K, y, q, scale);
    case TT_F16: return rms_norm_row<V>(static_cast<const fp16*>(x), weight, eps, K, y, q, scale);
    default: return rms_norm_row<V>(static_cast<const float*>(x), weight, eps, K, y, q, scale);
  }
}

}  // namespace
}  // namespace trimtab
