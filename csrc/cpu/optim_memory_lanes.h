// The loops of optim_memory.h over a vector type V. A tail is a whole vector on a copy of the last bytes, so
// that any split gives the same bits.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../math/master.h"
#include "bits_max.h"
#include "optim_memory.h"

namespace trimtab {
namespace {

constexpr int kMaxLanes = 16;
constexpr int kCodeGroup = 4 * kMaxLanes;  // codes that one store takes, at most

// The last elements of an array, with room for a whole vector; they go back unless T is const.
template <class T>
struct Tail {
  using Value = std::remove_const_t<T>;
  T* const array;
  const size_t bytes;
  alignas(64) Value data[kMaxLanes] = {};

  Tail(T* from, size_t count) : array(from), bytes(count * sizeof(T)) {
    std::memcpy(data, array, bytes);
  }
  ~Tail() {
    if constexpr (!std::is_const<T>::value) std::memcpy(array, data, bytes);
  }
};

// body(i, pointers...): one vector of each array, of its elements from i on.
template <class V, class Body, class... T>
TT_INLINE void for_whole_vectors(int64_t n, Body&& body, T*... arrays) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) body(i, (arrays + i)...);
  const size_t rest = size_t(n - i);
  if (rest > 0) {
    [&](auto&&... tails) { body(i, tails.data...); }(Tail<T>(arrays + i, rest)...);
  }
}

template <class V, bool kSigned>
void decode_block(const uint8_t* codes, float scale, float* to, int64_t n) {
  using U = typename WordsOf<V>::type;
  for_whole_vectors<V>(
      n,
      [scale](int64_t, const uint8_t* c, float* out) {
        (dynamic_value<kSigned>(U::load_bytes(c).to_floats()) * V(scale)).store(out);
      },
      codes, to);
}

template <class V>
void decode(const uint8_t* codes, const float* scale, bool is_signed, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kDynamicBlock) {
    const int64_t count = std::min<int64_t>(n - i, kDynamicBlock);
    (is_signed ? decode_block<V, true> : decode_block<V, false>)(codes + i, *scale++, to + i,
                                                                 count);
  }
}

inline float finite_scale(float largest) {
  return is_finite(F32x1(largest)).m ? largest : float_from_bits(0x7fc00000u);
}

// max |x| of n elements, a multiple of the lanes; NaN if one is NaN or Inf.
template <class V>
float block_scale(const float* x, int64_t n) {
  V largest(0.0f);
  for (int64_t i = 0; i < n; i += V::lanes) largest = bits_max(largest, abs(V::load(x + i)));
  return finite_scale(bits_max_across(largest));
}

// A scale below 2^-128 has no finite inverse; then codes come out too small, of numbers below 3e-39.
inline float inverse_scale(float scale) {
  if (!(scale > 0.0f)) return 0.0f;
  return 1.0f / scale < 3.4028234e38f ? 1.0f / scale : 3.4028234e38f;
}

// Four vectors; element: number of the first, mod 2^32, a multiple of their lanes.
template <class V, bool kSigned, bool kStochastic>
TT_INLINE void encode_vectors(const float* from, V inverse, RandomKey key, uint32_t element,
                              uint8_t* codes) {
  using U = typename WordsOf<V>::type;
  const U start(kStochastic ? random_start(key, element) : 0u);
  V steps[4];
  for (int k = 0; k < 4; ++k) {
    const V x = V::load(from + k * V::lanes);
    if (kStochastic) {
      const U bits = random_bits_of(key, start ^ U::from(uint32_t(k * V::lanes)));
      if constexpr (U::has_lookup32) {
        steps[k] = dynamic_stochastic32<kSigned>(x, inverse, random24<V>(bits));
      } else {
        steps[k] = dynamic_stochastic<kSigned>(x, inverse, uniform<V>(bits));
      }
    } else {
      steps[k] = dynamic_nearest<kSigned>(x, inverse);
    }
  }
  U::store_codes(steps, kDynamicBias<kSigned>, codes);
}

// All of a block, or what there is rounded up to a multiple of kCodeGroup.
template <class V, bool kSigned, bool kStochastic>
void encode_block(const float* from, float scale, RandomKey key, uint32_t element, uint8_t* codes,
                  int64_t n) {
  const V inverse(inverse_scale(scale));
  for (int64_t i = 0; i < n; i += 4 * V::lanes) {
    encode_vectors<V, kSigned, kStochastic>(from + i, inverse, key, element + uint32_t(i),
                                            codes + i);
  }
}

template <class V>
void encode(float* from, bool is_signed, const RandomKey* key, int64_t element, uint8_t* codes,
            float* scale, int64_t n) {
  const auto loop =
      key ? (is_signed ? encode_block<V, true, true> : encode_block<V, false, true>)
          : (is_signed ? encode_block<V, true, false> : encode_block<V, false, false>);
  for (int64_t i = 0; i < n; i += kDynamicBlock) {
    const int64_t count = std::min<int64_t>(n - i, kDynamicBlock);
    const int64_t whole = (count + kCodeGroup - 1) / kCodeGroup * kCodeGroup;
    std::fill(from + i + count, from + i + whole, 0.0f);
    const float s = *scale++ = block_scale<V>(from + i, whole);
    const RandomKey around = key ? key_around(*key, element) : RandomKey{};
    uint8_t partial[kDynamicBlock];
    uint8_t* const to = whole == count ? codes + i : partial;
    loop(from + i, s, around, uint32_t(element + i), to, whole);
    if (to == partial) std::memcpy(codes + i, partial, size_t(count));
  }
}

template <class V>
void narrow_stochastic(const float* from, RandomKey key, int64_t element, bf16* to, int64_t n) {
  using U = typename WordsOf<V>::type;
  key = key_around(key, element);
  for_whole_vectors<V>(
      n,
      [=](int64_t i, const float* x, uint16_t* out) {
        const U bits = random_bits(key, U::from(uint32_t(element) + uint32_t(i)));
        stochastic_bf16(V::load(x), bits).store16(out);
      },
      from, reinterpret_cast<uint16_t*>(to));
}

// One vector of fp32 numbers from and to bf16 parameters and their masters.
template <class V>
struct Remainder {
  using U = typename WordsOf<V>::type;
  static TT_INLINE V open(const bf16* p, const uint16_t* r) {
    return join_remainder<V>(U::load16(reinterpret_cast<const uint16_t*>(p)), U::load16(r));
  }
  static TT_INLINE void close(V x, bf16* p, uint16_t* r) {
    U upper, lower;
    split_remainder(x, &upper, &lower);
    upper.store16(reinterpret_cast<uint16_t*>(p));
    lower.store16(r);
  }
};

template <class V>
struct Kahan {
  static TT_INLINE V open(const bf16* p, const uint16_t* c) {
    return V::load(p) + V::load(reinterpret_cast<const bf16*>(c));
  }
  static TT_INLINE void close(V x, bf16* p, uint16_t* c) {
    x.store(p);
    lost(x, V::load(p)).store(reinterpret_cast<bf16*>(c));
  }
};

template <class V, class Master>
void open_master(const bf16* param, const uint16_t* master, float* to, int64_t n) {
  for_whole_vectors<V>(
      n,
      [](int64_t, const bf16* p, const uint16_t* r, float* out) { Master::open(p, r).store(out); },
      param, master, to);
}

template <class V, class Master>
void close_master(const float* from, bf16* param, uint16_t* master, int64_t n) {
  for_whole_vectors<V>(
      n, [](int64_t, const float* x, bf16* p, uint16_t* r) { Master::close(V::load(x), p, r); },
      from, param, master);
}

template <class V>
OptimMemoryKernels optim_memory(OptimCodedFn (*coded)(tt_rule, int, bool),
                                OptimHalvesFn (*halves)(tt_rule, int, int)) {
  return {decode<V>,
          encode<V>,
          narrow_stochastic<V>,
          open_master<V, Remainder<V>>,
          close_master<V, Remainder<V>>,
          open_master<V, Kahan<V>>,
          close_master<V, Kahan<V>>,
          coded,
          halves};
}

}  // namespace
}  // namespace trimtab
