// U32x1: one 32-bit word, host and device, with the interface of U32x8 and U32x16 (csrc/cpu): the integer
// side of F32x1, F32x8 and F32x16, for hashes, bit patterns and codes.
//
//   + * ^ & >> <<     modulo 2^32, lane by lane; shifts are logical
//   Words(V), floats()   the bits of as many floats, and back
//   to_floats()       the numbers themselves, below 2^24;  of_integral(V) the other way
//   from(start)       start, start + 1, ... in the lanes
//   times_shift16(c)  x * c >> 16, for x and c below 2^16;  plus_one(mask)  x + 1 where the mask holds
//   lookup8(t), lookup16(t)   lane by lane t[x & 7], t[x & 15];  lookup32(t), where has_lookup32, t[x & 31]
//   store_codes(v, bias, p)   four vectors of floats, rounded to nearest, plus bias, at least 0, as bytes
//   load_bytes, store_bytes, load16, store16   one byte or 16 bits a lane, which must fit
// WordsOf<V>::type is the type that belongs to a vector of floats.
#pragma once
#include "f32x1.h"

namespace trimtab {
namespace {

template <class V>
struct WordsOf;

struct U32x1 {
  static constexpr int lanes = 1;
  static constexpr bool has_lookup32 = false;  // no faster than what needs none
  uint32_t v;

  U32x1() = default;
  TT_INLINE U32x1(uint32_t x) : v(x) {}
  explicit TT_INLINE U32x1(F32x1 x) : v(float_bits(x.v)) {}
  TT_INLINE F32x1 floats() const { return float_from_bits(v); }
  TT_INLINE F32x1 to_floats() const { return F32x1::from_int32(int32_t(v)); }
  static TT_INLINE U32x1 of_integral(F32x1 x) { return uint32_t(to_int32_rne(x)); }
  static TT_INLINE U32x1 from(uint32_t start) { return start; }
  TT_INLINE F32x1 lookup8(const float* table) const { return table[v & 7]; }
  TT_INLINE F32x1 lookup16(const float* table) const { return table[v & 15]; }
  TT_INLINE U32x1 times_shift16(uint32_t c) const { return v * c >> 16; }
  TT_INLINE U32x1 plus_one(Mask1 mask) const { return v + (mask.m ? 1u : 0u); }

  static TT_INLINE U32x1 load_bytes(const uint8_t* p) { return uint32_t{*p}; }
  static TT_INLINE U32x1 load16(const uint16_t* p) { return uint32_t{*p}; }
  TT_INLINE void store_bytes(uint8_t* p) const { *p = uint8_t(v); }
  TT_INLINE void store16(uint16_t* p) const { *p = uint16_t(v); }

  static TT_INLINE void store_codes(const F32x1 (&from)[4], int32_t bias, uint8_t* p) {
    for (int k = 0; k < 4; ++k) {
      const int32_t code = to_int32_rne(from[k]) + bias;
      p[k] = uint8_t(code < 0 ? 0 : code);
    }
  }

  friend TT_INLINE U32x1 operator+(U32x1 a, U32x1 b) { return a.v + b.v; }
  friend TT_INLINE U32x1 operator*(U32x1 a, U32x1 b) { return a.v * b.v; }
  friend TT_INLINE U32x1 operator^(U32x1 a, U32x1 b) { return a.v ^ b.v; }
  friend TT_INLINE U32x1 operator&(U32x1 a, U32x1 b) { return a.v & b.v; }
  friend TT_INLINE U32x1 operator>>(U32x1 a, int n) { return a.v >> n; }
  friend TT_INLINE U32x1 operator<<(U32x1 a, int n) { return a.v << n; }
};

template <>
struct WordsOf<F32x1> {
  using type = U32x1;
};

// -a where the sign of b is set, else a
TT_INLINE F32x1 flip_sign(F32x1 a, F32x1 b) {
  return (U32x1(a) ^ (U32x1(b) & U32x1(0x80000000u))).floats();
}
// max(|a|, b), b > 0; b where a is NaN
TT_INLINE F32x1 max_magnitude(F32x1 a, F32x1 b) { return max(abs(a), b); }

}  // namespace
}  // namespace trimtab
