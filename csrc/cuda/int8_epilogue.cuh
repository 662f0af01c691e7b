// From int32 sums to outputs (NUMERICS.md section 3, csrc/math/epilogue.h), eight columns of a row a time.
//
// Kernels call it in a loop that is not unrolled, their sums in shared memory: five activations, eight
// values each, are 2000 instructions, and one copy of them stays in the instruction cache.
#pragma once
#include <trimtab/int8_mm.h>

#include "cuda/ptx.cuh"
#include "math/dtypes.h"
#include "math/epilogue.h"
#include "math/f32x1.h"

namespace trimtab {

struct EpilogueParams {
  const float* a_scale;  // [M]
  const float* b_scale;  // [N], or NULL where the sums are floats
  const void* bias;  // [N] of bias_dtype, or NULL
  void* out;  // [M, N] of out_dtype, rows out_stride elements apart
  int64_t out_stride;
  int32_t M, N;
  int32_t bias_dtype, out_dtype, activation;
  bool wide;  // out and its rows are aligned to eight values, 16 bytes at most
  const float* out_scale;  // [1] for int8 out, else NULL
};

inline EpilogueParams epilogue_params(const float* a_scale, int64_t M, int64_t N,
                                      const tt_epilogue& epilogue) {
  EpilogueParams e;
  e.a_scale = a_scale;
  e.b_scale = epilogue.b_scale;
  e.bias = epilogue.bias;
  e.out = epilogue.out;
  e.out_stride = epilogue.out_stride;
  e.M = int32_t(M);
  e.N = int32_t(N);
  e.bias_dtype = int32_t(epilogue.bias_dtype);
  e.out_dtype = int32_t(epilogue.out_dtype);
  e.activation = int32_t(epilogue.activation);
  e.out_scale = epilogue.out_scale;
  const int64_t size = e.out_dtype == TT_F32 ? 4 : e.out_dtype == TT_I8 ? 1 : 2;
  const int64_t alignment = e.out_dtype == TT_I8 ? 8 : 16;
  e.wide = reinterpret_cast<uintptr_t>(epilogue.out) % uintptr_t(alignment) == 0 &&
           (epilogue.out_stride * size % alignment == 0 || M == 1);
  return e;
}

namespace {

constexpr int kGroup = 8;  // columns finished at once: 16 bytes of bf16 or fp16, 8 of int8

// What the columns n, n + step, .. bring along; the same for every row.
struct ColumnGroup {
  float scale[kGroup];
  float bias[kGroup];
};

// -0.0 where there is no bias: t + -0.0 is t, for -0.0 too.
TT_DEVICE float load_bias(const EpilogueParams& e, int n) {
  if (e.bias == nullptr) return -0.0f;
  if (e.bias_dtype == TT_F32) return load_global(static_cast<const float*>(e.bias) + n);
  const uint16_t bits = load_global(static_cast<const uint16_t*>(e.bias) + n);
  return e.bias_dtype == TT_BF16 ? to_float(bf16{bits}) : to_float(fp16{bits});
}

// Columns from N on get zeros; they are not stored.
TT_DEVICE ColumnGroup load_columns(const EpilogueParams& e, int n, int step) {
  ColumnGroup columns;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const int column = n + j * step;
    const bool inside = column < e.N;
    columns.scale[j] = inside && e.b_scale != nullptr ? load_global(e.b_scale + column) : 0.0f;
    columns.bias[j] = inside ? load_bias(e, column) : 0.0f;
  }
  return columns;
}

template <Activation kActivation, int kCount>
TT_DEVICE void activate_all(float (&t)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) t[j] = activate<kActivation>(F32x1(t[j])).v;
}

// The switch stands around the group, so that a group's values run side by side.
template <int kCount>
TT_DEVICE void activate_all(int activation, float (&t)[kCount]) {
  switch (static_cast<Activation>(activation)) {
    case Activation::none: break;
    case Activation::relu: activate_all<Activation::relu>(t); break;
    case Activation::gelu: activate_all<Activation::gelu>(t); break;
    case Activation::gelu_tanh: activate_all<Activation::gelu_tanh>(t); break;
    case Activation::silu: activate_all<Activation::silu>(t); break;
  }
}

// t = act(float(sum) * b_scale * a_scale + bias)
TT_DEVICE void finish_group(const EpilogueParams& e, float a_scale, const ColumnGroup& columns,
                            const int32_t (&sum)[kGroup], float (&t)[kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    t[j] = epilogue<Activation::none>(F32x1(static_cast<float>(sum[j])), F32x1(a_scale),
                                      F32x1(columns.scale[j]), F32x1(columns.bias[j]))
               .v;
  activate_all(e.activation, t);
}

// t = act(sum + bias)
TT_DEVICE void finish_group(const EpilogueParams& e, float, const ColumnGroup& columns,
                            const float (&sum)[kGroup], float (&t)[kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) t[j] = (F32x1(sum[j]) + F32x1(columns.bias[j])).v;
  activate_all(e.activation, t);
}

TT_DEVICE uint32_t round_to_16_bits(int out_dtype, float t) {
  return out_dtype == TT_BF16 ? to_bf16(t).bits : to_fp16(t).bits;
}

// 1 / out_scale, which only int8 out has.
TT_DEVICE float load_inverse(const EpilogueParams& e) {
  if (e.out_scale == nullptr) return 0.0f;
  return (F32x1(1.0f) / F32x1(load_global(e.out_scale))).v;
}

TT_DEVICE int32_t round_to_int8(float t, float inverse) {
  return to_int32_rne(int8_code(F32x1(t), F32x1(inverse)));
}

// t to element `at` of out.
TT_DEVICE void store_one(const EpilogueParams& e, int64_t at, float inverse, float t) {
  if (e.out_dtype == TT_F32) store_global(static_cast<float*>(e.out) + at, t);
  else if (e.out_dtype == TT_I8)
    store_global(static_cast<int8_t*>(e.out) + at, static_cast<int8_t>(round_to_int8(t, inverse)));
  else
    store_global(static_cast<uint16_t*>(e.out) + at,
                 static_cast<uint16_t>(round_to_16_bits(e.out_dtype, t)));
}

// t[j] to column n + j * step, those below N.
TT_DEVICE void store_each(const EpilogueParams& e, int m, int n, int step, float inverse,
                          const float (&t)[kGroup]) {
  const int64_t row = int64_t(m) * e.out_stride;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const int column = n + j * step;
    if (column < e.N) store_one(e, row + column, inverse, t[j]);
  }
}

// Two at once by the hardware's rounding, then the one NaN of math/dtypes.h.
TT_DEVICE uint32_t round_to_32_bits(int out_dtype, float low, float high) {
  const uint32_t nan = out_dtype == TT_BF16 ? kBf16Nan : kFp16Nan;
  uint32_t two = out_dtype == TT_BF16 ? round_bf16x2(low, high) : round_fp16x2(low, high);
  if (low != low) two = (two & 0xffff0000u) | nan;
  if (high != high) two = (two & 0xffffu) | nan << 16;
  return two;
}

struct alignas(8) Bytes8 {
  uint32_t word[2];
};

TT_DEVICE Bytes8 round_to_8_bytes(float inverse, const float (&t)[kGroup]) {
  Bytes8 packed = {};
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    packed.word[j / 4] |= (uint32_t(round_to_int8(t[j], inverse)) & 0xffu) << (j % 4 * 8);
  return packed;
}

// t to columns n .. n + 7 in stores of 16 bytes, or 8 of int8; n a multiple of 8, the out wide.
TT_DEVICE void store_wide(const EpilogueParams& e, int m, int n, float inverse,
                          const float (&t)[kGroup]) {
  const int64_t at = int64_t(m) * e.out_stride + n;
  if (e.out_dtype == TT_I8) {
    int8_t* to = static_cast<int8_t*>(e.out) + at;
    store_global(reinterpret_cast<Bytes8*>(to), round_to_8_bytes(inverse, t));
    return;
  }
  if (e.out_dtype == TT_F32) {
    Bytes16 half[2];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) half[j / 4].word[j % 4] = float_bits(t[j]);
    store16(static_cast<float*>(e.out) + at, half[0]);
    store16(static_cast<float*>(e.out) + at + 4, half[1]);
    return;
  }
  Bytes16 packed;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    packed.word[j] = round_to_32_bits(e.out_dtype, t[2 * j], t[2 * j + 1]);
  store16(static_cast<uint16_t*>(e.out) + at, packed);
}

// Columns n .. n + 7 (n a multiple of 8) of row m < M, in wide stores where out allows it.
TT_DEVICE void store_group(const EpilogueParams& e, int m, int n, float inverse,
                           const float (&t)[kGroup]) {
  if (e.wide && n + kGroup <= e.N) store_wide(e, m, n, inverse, t);
  else store_each(e, m, n, 1, inverse, t);
}

}  // namespace
}  // namespace trimtab
