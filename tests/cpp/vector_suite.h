// What one vector type (TT_LANES = 1, 8 or 16) offers to test_activation.cpp, as plain functions.
#pragma once

#if TT_LANES == 16
#include "cpu/f32x16.h"
#elif TT_LANES == 8
#include "cpu/f32x8.h"
#endif
#include <algorithm>
#include <cstddef>
#include <cstdio>

#include "math/activation.h"
#include "math/f32x1.h"

enum { kExp, kTanh, kErf, kRelu, kGelu, kGeluTanh, kSilu, kFunctions };
constexpr int kOps = 26;

// What one vector type offers to the tests; counts are multiples of 16.
struct Suite {
  int lanes;
  void (*eval)(int function, const float* x, float* out, size_t count);
  void (*op)(int op, const float* a, const float* b, float* out, size_t count);
  void (*widen)(bool half, const uint16_t* bits, float* out, size_t count);
  void (*narrow)(bool half, const float* x, uint16_t* bits, size_t count);
  int (*partial)();  // failures of load_n, store_n, store_int8, max_across, any, all
};

#define TT_CAT_(a, b) a##b
#define TT_CAT(a, b) TT_CAT_(a, b)
Suite suite_1();
Suite suite_8();
Suite suite_16();

namespace {
using namespace trimtab;
#if TT_LANES == 16
using V = F32x16;
#elif TT_LANES == 8
using V = F32x8;
#else
using V = F32x1;
#endif

template <class F>
void map(F f, const float* a, const float* b, float* out, size_t count) {
  for (size_t i = 0; i < count; i += V::lanes) f(V::load(a + i), V::load(b + i)).store(out + i);
}

void eval(int function, const float* x, float* out, size_t count) {
  switch (function) {
    case kExp: return map([](V v, V) { return trimtab::exp(v); }, x, x, out, count);
    case kTanh: return map([](V v, V) { return trimtab::tanh(v); }, x, x, out, count);
    case kErf: return map([](V v, V) { return trimtab::erf(v); }, x, x, out, count);
    case kRelu: return map([](V v, V) { return activate<Activation::relu>(v); }, x, x, out, count);
    case kGelu: return map([](V v, V) { return activate<Activation::gelu>(v); }, x, x, out, count);
    case kGeluTanh:
      return map([](V v, V) { return activate<Activation::gelu_tanh>(v); }, x, x, out, count);
    case kSilu: return map([](V v, V) { return activate<Activation::silu>(v); }, x, x, out, count);
  }
}

// Every operation of the interface, numbered. Operands that a contract excludes are mapped into it.
void op(int op, const float* a, const float* b, float* out, size_t count) {
  const auto flag = [](V::Mask m) { return select(m, V(1.0f), V(0.0f)); };
  const auto each = [&](auto f) { map(f, a, b, out, count); };
  const auto short12 = [](V x) { return bit_and(x, 0xfffff000u); };  // products of two are exact
  const auto range = [](V x, float low, float high) {
    return rint(max(V(low), min(V(high), select(is_nan(x), V(0.0f), x))));
  };
  // 1 <= |x| < 2
  const auto unit = [](V x) { return bit_or(bit_and(x, 0x807fffffu), 0x3f800000u); };
  switch (op) {
    case 0: return each([](V x, V y) { return x + y; });
    case 1: return each([](V x, V y) { return x - y; });
    case 2: return each([](V x, V y) { return x * y; });
    case 3: return each([](V x, V y) { return x / y; });
    case 4: return each([](V x, V) { return -x; });
    case 5: return each([&](V x, V y) { return flag(x < y); });
    case 6: return each([&](V x, V y) { return flag(x <= y); });
    case 7: return each([&](V x, V y) { return flag(x > y); });
    case 8: return each([&](V x, V y) { return flag(x >= y); });
    case 9: return each([&](V x, V y) { return flag(x == y); });
    case 10: return each([&](V x, V y) { return flag(((x < y) | is_nan(x)) & !is_nan(y)); });
    case 11: return each([&](V x, V) { return flag(is_finite(x)); });
    case 12: return each([](V x, V y) { return min(x, y); });
    case 13: return each([](V x, V y) { return max(x, y); });
    case 14: return each([](V x, V) { return abs(x); });
    case 15: return each([](V x, V y) { return copysign(x, y); });
    case 16: return each([](V x, V) { return rint(x); });
    case 17: return each([](V x, V) { return floor(x); });
    case 18: return each([](V x, V) { return ceil(x); });
    case 19: return each([](V x, V) { return sqrt(x); });
    case 20: return each([](V x, V) { return bit_xor(x, 0x80000001u); });
    case 21:
      return each([&](V x, V y) { return mul_add_exact(short12(unit(x)), short12(unit(y)), y); });
    case 22:
      return each([&](V x, V y) { return mul_sub_exact(short12(unit(x)), short12(unit(y)), y); });
    case 23: return each([&](V x, V y) { return ldexp(unit(x), range(y, -226.0f, 128.0f)); });
    case 24: return each([&](V x, V y) { return scale2n(unit(x), range(y, -126.0f, 127.0f)); });
    case 25:
      return each([&](V x, V y) { return pow2_addend(range(y, -226.0f, 127.0f)) + unit(x); });
  }
}

template <class H>
void widen_as(const uint16_t* bits, float* out, size_t count) {
  H h[V::lanes];
  for (size_t i = 0; i < count; i += V::lanes) {
    for (int k = 0; k < V::lanes; ++k) h[k].bits = bits[i + k];
    V::load(h).store(out + i);
  }
}
void widen(bool half, const uint16_t* bits, float* out, size_t count) {
  half ? widen_as<fp16>(bits, out, count) : widen_as<bf16>(bits, out, count);
}

template <class H>
void narrow_as(const float* x, uint16_t* bits, size_t count) {
  H h[V::lanes];
  for (size_t i = 0; i < count; i += V::lanes) {
    V::load(x + i).store(h);
    for (int k = 0; k < V::lanes; ++k) bits[i + k] = h[k].bits;
  }
}
void narrow(bool half, const float* x, uint16_t* bits, size_t count) {
  half ? narrow_as<fp16>(x, bits, count) : narrow_as<bf16>(x, bits, count);
}

// T small integers through load_n and store_n: lanes from n on read 0 and are not written.
template <class T, class To>
int partial_as(int n, T sentinel, To to) {
  T in[V::lanes + 1], out[V::lanes + 1];
  float seen[V::lanes];
  int failures = 0;
  for (int k = 0; k <= V::lanes; ++k) in[k] = to(float(3 * k - 20)), out[k] = sentinel;
  const V x = V::load_n(in, n);
  x.store(seen);
  for (int k = 0; k < V::lanes; ++k) failures += seen[k] != (k < n ? float(3 * k - 20) : 0.0f);
  V::load(in).store_n(out, n);
  for (int k = 0; k <= V::lanes; ++k) {
    failures += std::memcmp(&out[k], k < n ? &in[k] : &sentinel, sizeof(T)) != 0;
  }
  return failures;
}

int partial() {
  int failures = 0;
  for (int n = 0; n <= V::lanes; ++n) {
    failures += partial_as<float>(n, 99.0f, [](float x) { return x; });
    failures += partial_as<bf16>(n, bf16{77}, [](float x) { return to_bf16(x); });
    failures += partial_as<fp16>(n, fp16{77}, [](float x) { return to_fp16(x); });
    int32_t words[V::lanes + 1];
    int8_t bytes[V::lanes + 1], whole[V::lanes + 1];
    float x[V::lanes], seen[V::lanes];
    for (int k = 0; k <= V::lanes; ++k) {
      words[k] = (1 << 30) + 65 * k;  // not an fp32: it must round to even
      bytes[k] = whole[k] = 99;
      if (k < V::lanes) x[k] = float(8 * k) - 62.5f;
    }
    V::load_n(words, n).store(seen);
    for (int k = 0; k < V::lanes; ++k) failures += seen[k] != (k < n ? float(words[k]) : 0.0f);
    store_int8_n(bytes, V::load(x), n);
    store_int8(whole, V::load(x));
    for (int k = 0; k <= V::lanes; ++k) {
      const int rne = 8 * k - 62;  // the halves lie on -62.5, -54.5, ...: the even neighbour is up
      failures += bytes[k] != (k < n ? rne : 99);
      failures += whole[k] != (k < V::lanes ? rne : 99);
    }
    const V v = V::load(x);
    failures += max_across(v) != x[V::lanes - 1] || max_across(-v) != 62.5f;
    failures += !any(v < V(-62.0f)) || any(v < V(-63.0f)) || !all(v > V(-63.0f));
  }
  return failures;
}
}  // namespace

Suite TT_CAT(suite_, TT_LANES)() { return {TT_LANES, eval, op, widen, narrow, partial}; }
