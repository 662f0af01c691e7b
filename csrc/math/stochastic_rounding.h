// Rounding up with the probability that makes the mean right, from a hash instead of a generator:
//
//   bits(seed, step, tensor, stream, element)
//
// depends on nothing else, so that threads, vectors and the split into pieces don't matter, and a run can be
// repeated. What is hashed per element is 32 bits wide and two multiplications long; the rest goes into a
// key, made once a tensor and step.
#pragma once
#include "u32x1.h"

namespace trimtab {

struct RandomKey {
  uint32_t low, high;
};

namespace {

// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit.
TT_INLINE uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// At most 16 streams: what a tensor rounds in one step.
TT_INLINE RandomKey random_key(uint64_t seed, uint64_t step, uint64_t tensor, uint64_t stream) {
  const uint64_t z = mix64(mix64(mix64(seed) ^ step) ^ (tensor * 16 + stream));
  return {uint32_t(z), uint32_t(z >> 32)};
}

// The key of the 2^32 elements around `element`; the words count within those.
TT_INLINE RandomKey key_around(RandomKey key, int64_t element) {
  const uint64_t upper = uint64_t(element) >> 32;
  if (upper == 0) return key;
  const uint64_t z = mix64((uint64_t(key.high) << 32 | key.low) ^ mix64(upper));
  return {uint32_t(z), uint32_t(z >> 32)};
}

// Xorshift and multiply, twice (shape and constants of Mueller's and Wellons' 32-bit hashes), the second
// half of the key between the two.
template <class U>
TT_INLINE U random_bits_of(RandomKey key, U first_xorshift) {
  U x = first_xorshift * U(0x7feb352du);
  x = (x ^ (x >> 15)) + U(key.high);
  x = (x ^ (x >> 16)) * U(0x846ca68bu);
  return x ^ (x >> 16);
}
template <class U>
TT_INLINE U random_bits(RandomKey key, U element) {
  const U x = element ^ U(key.low);
  return random_bits_of(key, x ^ (x >> 16));
}
// The first xorshift of element ^ key.low; of element + i, it is this ^ i, for i below a power of two that divides
// element, and below 2^16.
TT_INLINE uint32_t random_start(RandomKey key, uint32_t element) {
  const uint32_t x = element ^ key.low;
  return x ^ x >> 16;
}

// 24 bits as an integer, and in [0, 1).
template <class V>
TT_INLINE V random24(typename WordsOf<V>::type bits) {
  return (bits >> 8).to_floats();
}
template <class V>
TT_INLINE V uniform(typename WordsOf<V>::type bits) {
  return random24<V>(bits) * V(5.9604644775390625e-8f);  // 2^-24
}

// The upper or lower bf16 neighbour of x, as 16 bits: 16 random bits added to those that go away carry with
// just that probability. Inf stays; a finite x above the largest bf16 may become Inf; NaN is kBf16Nan.
template <class V>
TT_INLINE typename WordsOf<V>::type stochastic_bf16(V x, typename WordsOf<V>::type bits) {
  using U = typename WordsOf<V>::type;
  const U up = U(x) + (bits >> 16);
  return U(select(is_nan(x), U(uint32_t{kBf16Nan} << 16).floats(), up.floats())) >> 16;
}

}  // namespace
}  // namespace trimtab
