// The row loops of int8_embedding and int8_embedding_bag. The compiler vectorizes the plain ones with
// the registers of the file's instruction set; V rounds to the output dtype. Internal linkage: included
// once an instruction set.
#pragma once
#include "cpu/int8_embedding.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int64_t kPiece = 128;  // floats between the two halves of a loop: 512 bytes of L1

template <class V, class T>
void store_rounded(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::load(from + i).store(to + i);
  if (i < n) V::load_n(from + i, int(n - i)).store_n(to + i, int(n - i));
}

// Fills pieces of floats and rounds them: fill(first, count, piece).
template <class V, class Fill>
void by_pieces(int64_t n, void* out, tt_dtype dtype, Fill&& fill) {
  float piece[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = n - i < kPiece ? n - i : kPiece;
    fill(i, count, piece);
    switch (dtype) {
      case TT_BF16: store_rounded<V>(piece, count, static_cast<bf16*>(out) + i); break;
      case TT_F16: store_rounded<V>(piece, count, static_cast<fp16*>(out) + i); break;
      default: store_rounded<V>(piece, count, static_cast<float*>(out) + i);
    }
  }
}

template <class V, class T>
void dequantize_row(const int8_t* q, float scale, int64_t n, T* out) {
  int64_t i = 0;
  if constexpr (V::lanes == 16 && sizeof(T) == 2) {
    for (; i + 32 <= n; i += 32)
      V::store_pair(out + i, V::load(q + i) * V(scale), V::load(q + i + 16) * V(scale));
  }
  for (; i + V::lanes <= n; i += V::lanes) (V::load(q + i) * V(scale)).store(out + i);
  int8_t rest[V::lanes] = {};
  const int count = int(n - i);
  for (int j = 0; j < count && j < V::lanes; ++j) rest[j] = q[i + j];
  (V::load(rest) * V(scale)).store_n(out + i, count);
}

template <class V>
void dequantize(const int8_t* q, float scale, int64_t n, void* out, tt_dtype dtype) {
  switch (dtype) {
    case TT_BF16: return dequantize_row<V>(q, scale, n, static_cast<bf16*>(out));
    case TT_F16: return dequantize_row<V>(q, scale, n, static_cast<fp16*>(out));
    default: return dequantize_row<V>(q, scale, n, static_cast<float*>(out));
  }
}

// A weight of 1 is a product that changes nothing, NaN included.
inline void add(const int8_t* q, float scale, float weight, int64_t n, float* acc) {
  for (int64_t i = 0; i < n; ++i) acc[i] = acc[i] + float(int32_t(q[i])) * scale * weight;
}

// A divisor of 1 likewise.
template <class V>
void finish(const float* acc, float divisor, int64_t n, void* out, tt_dtype dtype) {
  by_pieces<V>(n, out, dtype, [&](int64_t first, int64_t count, float* piece) {
    for (int64_t i = 0; i < count; ++i) piece[i] = acc[first + i] / divisor;
  });
}

}  // namespace
}  // namespace trimtab
