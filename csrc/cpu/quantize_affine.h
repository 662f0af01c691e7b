// Affine quantization of groups on any vector type V; each instruction set brings V and how its codes
// are loaded and stored (load_codes, store_codes and their _n forms). Internal linkage: included once
// an instruction set.
#pragma once
#include <cstring>

#include "cpu/quantize_affine_kernels.h"
#include "math/f32x1.h"
#include "math/quantize.h"

namespace trimtab {
namespace {

// x [n] -> q [n], one scale and zero point
template <class V, class T>
void quantize_group(const T* x, int64_t n, float levels, uint8_t* q, float* scale,
                    uint8_t* zero_point) {
  V low(0.0f), high(0.0f);
  auto finite = is_finite(low);
  int64_t k = 0;
  for (; k + V::lanes <= n; k += V::lanes) {
    const V value = V::load(x + k);
    low = min(low, value);
    high = max(high, value);
    finite = finite & is_finite(value);
  }
  if (k < n) {  // the missing lanes read 0, which is inside every range
    const V value = V::load_n(x + k, int(n - k));
    low = min(low, value);
    high = max(high, value);
    finite = finite & is_finite(value);
  }
  const AffineScale group = affine_scale(-max_across(-low), max_across(high), all(finite), levels);
  *scale = group.scale;
  *zero_point = uint8_t(group.zero);
  if (group.inverse == 0.0f) {  // zeros, NaN or Inf: x * inverse could be NaN
    std::memset(q, 0, size_t(n));
    return;
  }
  const V inverse(group.inverse), zero(group.zero), top(levels);
  for (k = 0; k + V::lanes <= n; k += V::lanes)
    store_codes(q + k, affine_code(V::load(x + k), inverse, zero, top));
  if (k < n) {
    const int rest = int(n - k);
    store_codes_n(q + k, affine_code(V::load_n(x + k, rest), inverse, zero, top), rest);
  }
}

template <class V, class T>
void quantize_groups(const T* x, const AffineSpan& span) {
  for (int64_t k = 0, g = 0; k < span.n; k += span.group, ++g) {
    const int64_t n = span.n - k < span.group ? span.n - k : span.group;
    quantize_group<V>(x + k, n, span.levels, span.q + k, span.scale + g, span.zero_point + g);
  }
}

template <class V>
void quantize_affine(const void* x, tt_dtype dtype, const AffineSpan& span) {
  switch (dtype) {
    case TT_BF16: return quantize_groups<V>(static_cast<const bf16*>(x), span);
    case TT_F16: return quantize_groups<V>(static_cast<const fp16*>(x), span);
    default: return quantize_groups<V>(static_cast<const float*>(x), span);
  }
}

template <class V, class T>
void dequantize_groups(const AffineSpan& span, T* out) {
  for (int64_t begin = 0, g = 0; begin < span.n; begin += span.group, ++g) {
    const int64_t end = span.n - begin < span.group ? span.n : begin + span.group;
    const V scale(span.scale[g]), zero(float(span.zero_point[g]));
    int64_t k = begin;
    V code;
    for (; k + V::lanes <= end; k += V::lanes) {
      load_codes(span.q + k, &code);
      affine_value(code, zero, scale).store(out + k);
    }
    if (k < end) {
      const int rest = int(end - k);
      load_codes_n(span.q + k, rest, &code);
      affine_value(code, zero, scale).store_n(out + k, rest);
    }
  }
}

template <class V>
void dequantize_affine(const AffineSpan& span, void* out, tt_dtype dtype) {
  switch (dtype) {
    case TT_BF16: return dequantize_groups<V>(span, static_cast<bf16*>(out));
    case TT_F16: return dequantize_groups<V>(span, static_cast<fp16*>(out));
    default: return dequantize_groups<V>(span, static_cast<float*>(out));
  }
}

}  // namespace
}  // namespace trimtab
