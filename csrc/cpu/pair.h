// Pair<V>: two vectors of floats as one, with the interface of math/f32x1.h as far as the optimizers' rules use it.
// A formula on a Pair, or on a Pair of Pairs, writes each operation for all its vectors before the next: what an
// operation waits for was begun long before, where a processor looks too few operations ahead to find another
// vector's itself.
#pragma once
#include "bits_max.h"

namespace trimtab {
namespace {

template <class M>
struct PairMask {
  M low, high;
  friend TT_INLINE PairMask operator&(PairMask a, PairMask b) {
    return {a.low & b.low, a.high & b.high};
  }
  friend TT_INLINE PairMask operator|(PairMask a, PairMask b) {
    return {a.low | b.low, a.high | b.high};
  }
  friend TT_INLINE PairMask operator!(PairMask a) { return {!a.low, !a.high}; }
};

template <class V>
struct Pair {
  static constexpr int lanes = 2 * V::lanes;
  using Mask = PairMask<typename V::Mask>;
  V low, high;

  Pair() = default;
  TT_INLINE Pair(float x) : low(x), high(x) {}
  TT_INLINE Pair(V a, V b) : low(a), high(b) {}
  template <class T>
  static TT_INLINE Pair load(const T* p) {
    return {V::load(p), V::load(p + V::lanes)};
  }
  template <class T>
  TT_INLINE void store(T* p) const {
    low.store(p);
    high.store(p + V::lanes);
  }

  friend TT_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
  friend TT_INLINE Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
  friend TT_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
  friend TT_INLINE Pair operator/(Pair a, Pair b) { return {a.low / b.low, a.high / b.high}; }
  friend TT_INLINE Pair operator-(Pair a) { return {-a.low, -a.high}; }
  friend TT_INLINE Mask operator<(Pair a, Pair b) { return {a.low < b.low, a.high < b.high}; }
  friend TT_INLINE Mask operator<=(Pair a, Pair b) { return {a.low <= b.low, a.high <= b.high}; }
  friend TT_INLINE Mask operator>(Pair a, Pair b) { return {a.low > b.low, a.high > b.high}; }
  friend TT_INLINE Mask operator>=(Pair a, Pair b) { return {a.low >= b.low, a.high >= b.high}; }
  friend TT_INLINE Mask operator==(Pair a, Pair b) { return {a.low == b.low, a.high == b.high}; }
};

template <class V>
TT_INLINE Pair<V> fma(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class V>
TT_INLINE Pair<V> select(typename Pair<V>::Mask m, Pair<V> a, Pair<V> b) {
  return {select(m.low, a.low, b.low), select(m.high, a.high, b.high)};
}
template <class V>
TT_INLINE Pair<V> min(Pair<V> a, Pair<V> b) {
  return {min(a.low, b.low), min(a.high, b.high)};
}
template <class V>
TT_INLINE Pair<V> max(Pair<V> a, Pair<V> b) {
  return {max(a.low, b.low), max(a.high, b.high)};
}
template <class V>
TT_INLINE Pair<V> copysign(Pair<V> a, Pair<V> b) {
  return {copysign(a.low, b.low), copysign(a.high, b.high)};
}
template <class V>
TT_INLINE Pair<V> sqrt(Pair<V> a) {
  return {sqrt(a.low), sqrt(a.high)};
}
template <class V>
TT_INLINE Pair<V> abs(Pair<V> a) {
  return {abs(a.low), abs(a.high)};
}
template <class V>
TT_INLINE typename Pair<V>::Mask is_nan(Pair<V> a) {
  return {is_nan(a.low), is_nan(a.high)};
}

template <class V>
TT_INLINE Pair<V> bits_max(Pair<V> a, Pair<V> b) {
  return {bits_max(a.low, b.low), bits_max(a.high, b.high)};
}
template <class V>
TT_INLINE Pair<V> unsigned_max(Pair<V> a, Pair<V> b) {
  return {unsigned_max(a.low, b.low), unsigned_max(a.high, b.high)};
}
template <class V>
TT_INLINE float bits_max_across(Pair<V> a) {
  return bits_max_across(bits_max(a.low, a.high));
}

}  // namespace
}  // namespace trimtab
