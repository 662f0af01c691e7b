// 32 bytes of weight at once: eight, four or two groups of four.
#include <immintrin.h>

#include "cpu/sparse24_compress.h"

namespace trimtab {
namespace {

// For each byte of the bitmap (two groups) or half of one: which bytes of the weight a shuffle brings together.
struct ShuffleTables {
  uint32_t eight8[256];  // eight int8: four kept
  uint64_t eight16[256];  // eight of 16 bits: four kept
  uint64_t four32[16];  // four floats: two kept
  constexpr ShuffleTables() : eight8{}, eight16{}, four32{} {
    for (int mask = 0; mask < 256; ++mask) {
      int at = 0;
      for (int i = 0; i < 8 && at < 4; ++i) {
        if (!(mask >> i & 1)) continue;
        eight8[mask] |= uint32_t(i) << (8 * at);
        eight16[mask] |= uint64_t((2 * i + 1) << 8 | 2 * i) << (16 * at);
        if (mask < 16 && at < 2)
          four32[mask] |=
              uint64_t((4 * i + 3u) << 24 | (4 * i + 2) << 16 | (4 * i + 1) << 8 | 4 * i)
              << (32 * at);
        ++at;
      }
    }
  }
};
constexpr ShuffleTables kShuffles;

template <class T>
struct Lanes;

struct Lanes16 {
  // |w| of 16 bits is below 2^15, so that signed comparisons serve, one subtracted too.
  static __m256i score(__m256i w) { return _mm256_and_si256(w, _mm256_set1_epi16(0x7fff)); }
  static __m256i max(__m256i a, __m256i b) { return _mm256_max_epi16(a, b); }
  static __m256i greater(__m256i a, __m256i b) { return _mm256_cmpgt_epi16(a, b); }
  static __m256i minus(__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); }
  // Bit i: element i of the 16.
  static uint32_t bits(__m256i keep) {
    const uint32_t both = uint32_t(_mm256_movemask_epi8(_mm256_packs_epi16(keep, keep)));
    return (both & 0xff) | (both >> 8 & 0xff00);
  }
  static __m128i shuffle(uint32_t bits, int half) {
    return _mm_cvtsi64_si128(int64_t(kShuffles.eight16[bits >> (8 * half) & 255]));
  }
};
template <>
struct Lanes<bf16> : Lanes16 {};
template <>
struct Lanes<fp16> : Lanes16 {};

template <>
struct Lanes<float> {
  static __m256i score(__m256i w) { return _mm256_and_si256(w, _mm256_set1_epi32(0x7fffffff)); }
  static __m256i max(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }
  static __m256i greater(__m256i a, __m256i b) { return _mm256_cmpgt_epi32(a, b); }
  static __m256i minus(__m256i a, __m256i b) { return _mm256_sub_epi32(a, b); }
  static uint32_t bits(__m256i keep) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(keep)));
  }
  static __m128i shuffle(uint32_t bits, int half) {
    return _mm_cvtsi64_si128(int64_t(kShuffles.four32[bits >> (4 * half) & 15]));
  }
};

template <>
struct Lanes<int8_t> {
  // |w| - 64, from -64 to 64.
  static __m256i score(__m256i w) {
    return _mm256_sub_epi8(_mm256_abs_epi8(w), _mm256_set1_epi8(64));
  }
  static __m256i max(__m256i a, __m256i) { return a; }  // no NaN
  static __m256i greater(__m256i a, __m256i b) { return _mm256_cmpgt_epi8(a, b); }
  static __m256i minus(__m256i a, __m256i b) { return _mm256_sub_epi8(a, b); }
  static uint32_t bits(__m256i keep) { return uint32_t(_mm256_movemask_epi8(keep)); }
  static __m128i shuffle(uint32_t bits, int half) {
    const uint32_t low = kShuffles.eight8[bits >> (16 * half) & 255];
    const uint32_t high = kShuffles.eight8[bits >> (16 * half + 8) & 255] + 0x08080808u;
    return _mm_cvtsi64_si128(int64_t(uint64_t{high} << 32 | low));
  }
};

// Element i of every group takes element (i + by) % 4: bytes of a shuffle.
template <class T>
__m256i rotation(int by) {
  constexpr int size = sizeof(T);
  alignas(32) uint8_t from[32];
  for (int i = 0; i < 32; ++i) {
    const int group = i / (4 * size), element = i / size % 4;
    from[i] = uint8_t((group * 4 + (element + by) % 4) * size % 16 + i % size);
  }
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
}

// 1 where the element that a rotation brings comes from an earlier position: it goes first if it is as large.
template <class T>
__m256i earlier(int by) {
  alignas(32) T one[32 / sizeof(T)];
  std::memset(one, 0, sizeof one);
  for (int i = 0; i < int(32 / sizeof(T)); ++i)
    if ((i % 4 + by) % 4 < i % 4) std::memset(&one[i], 1, 1);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(one));
}

template <class T>
bool row(const T* weight, int64_t K, T* values, uint8_t* indices) {
  using L = Lanes<T>;
  constexpr int64_t kLanes = 32 / sizeof(T);
  constexpr CodeTable codes;
  const __m256i rotate1 = rotation<T>(1), rotate2 = rotation<T>(2), rotate3 = rotation<T>(3);
  const __m256i earlier1 = earlier<T>(1), earlier2 = earlier<T>(2), earlier3 = earlier<T>(3);
  __m256i most = L::score(_mm256_setzero_si256());
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + k));
    const __m256i s = L::score(w);
    most = L::max(most, s);
    // Which of the three others go before it; with two of them it is pruned.
    const auto before = [&](__m256i rotate, __m256i one) {
      return L::greater(_mm256_shuffle_epi8(s, rotate), L::minus(s, one));
    };
    const __m256i a = before(rotate1, earlier1), b = before(rotate2, earlier2);
    const __m256i c = before(rotate3, earlier3);
    const __m256i two =
        _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)));
    const uint32_t pruned = L::bits(two), kept = ~pruned;
    char* to = reinterpret_cast<char*>(values + k / 2);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to),
                     _mm_shuffle_epi8(_mm256_castsi256_si128(w), L::shuffle(kept, 0)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 8),
                     _mm_shuffle_epi8(_mm256_extracti128_si256(w, 1), L::shuffle(kept, 1)));
    std::memcpy(indices + k / 8, &kept, size_t(kLanes / 8));
  }
  // Masks to codes, where they lie.
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(codes.of)));
  const __m256i low = _mm256_set1_epi8(15);
  const int64_t bytes = k / 8;
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    __m256i* at = reinterpret_cast<__m256i*>(indices + i);
    const __m256i masks = _mm256_loadu_si256(at);
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(masks, low));
    const __m256i odd =
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(masks, 4), low));
    _mm256_storeu_si256(at, _mm256_or_si256(even, _mm256_slli_epi16(odd, 4)));
  }
  for (; i < bytes; ++i)
    indices[i] = uint8_t(codes.of[indices[i] & 15] | codes.of[indices[i] >> 4] << 4);
  bool sound = true;
  if (Score24<T>::kInf != 0) {
    alignas(32) T lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    for (const T& lane : lanes) sound = sound && score24(lane) <= Score24<T>::kInf;
  }
  return sparse24_groups(weight, k, K, values, indices) && sound;
}

}  // namespace

bool sparse24_row_avx2(const void* weight, tt_dtype dtype, int64_t K, void* values,
                       uint8_t* indices) {
  switch (dtype) {
    case TT_F32:
      return row(static_cast<const float*>(weight), K, static_cast<float*>(values), indices);
    case TT_BF16:
      return row(static_cast<const bf16*>(weight), K, static_cast<bf16*>(values), indices);
    case TT_F16:
      return row(static_cast<const fp16*>(weight), K, static_cast<fp16*>(values), indices);
    default:
      return row(static_cast<const int8_t*>(weight), K, static_cast<int8_t*>(values), indices);
  }
}

}  // namespace trimtab
