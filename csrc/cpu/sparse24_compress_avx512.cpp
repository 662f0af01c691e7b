// 64 bytes of weight at once; vpcompress brings the kept ones together (AVX512-VBMI2 for 8 and 16 bits).
#include <immintrin.h>

#include "cpu/sparse24_compress.h"

namespace trimtab {
namespace {

// rotate<r>: element i of every group of four takes element (i + r) % 4. Comparisons are unsigned, so that one
// may be added to any |w|.
struct Lanes16 {
  static __m512i score(__m512i w) { return _mm512_and_si512(w, _mm512_set1_epi16(0x7fff)); }
  static __m512i max(__m512i a, __m512i b) { return _mm512_max_epu16(a, b); }
  template <int r>
  static __m512i rotate(__m512i a) {
    return _mm512_ror_epi64(a, 16 * r);
  }
  static __m512i plus_one(__m512i a, uint64_t where) {
    return _mm512_mask_add_epi16(a, __mmask32(where), a, _mm512_set1_epi16(1));
  }
  static uint64_t greater(__m512i a, __m512i b) { return _mm512_cmpgt_epu16_mask(a, b); }
  static __m512i compress(uint64_t keep, __m512i w) {
    return _mm512_maskz_compress_epi16(__mmask32(keep), w);
  }
};
template <class T>
struct Lanes : Lanes16 {};

template <>
struct Lanes<float> {
  static __m512i score(__m512i w) { return _mm512_and_si512(w, _mm512_set1_epi32(0x7fffffff)); }
  static __m512i max(__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }
  template <int r>
  static __m512i rotate(__m512i a) {
    constexpr int order = r | (r + 1) % 4 << 2 | (r + 2) % 4 << 4 | (r + 3) % 4 << 6;
    return _mm512_shuffle_epi32(a, _MM_PERM_ENUM(order));
  }
  static __m512i plus_one(__m512i a, uint64_t where) {
    return _mm512_mask_add_epi32(a, __mmask16(where), a, _mm512_set1_epi32(1));
  }
  static uint64_t greater(__m512i a, __m512i b) { return _mm512_cmpgt_epu32_mask(a, b); }
  static __m512i compress(uint64_t keep, __m512i w) {
    return _mm512_maskz_compress_epi32(__mmask16(keep), w);
  }
};

template <>
struct Lanes<int8_t> {
  static __m512i score(__m512i w) { return _mm512_abs_epi8(w); }
  static __m512i max(__m512i a, __m512i) { return a; }  // no NaN
  template <int r>
  static __m512i rotate(__m512i a) {
    return _mm512_ror_epi32(a, 8 * r);
  }
  static __m512i plus_one(__m512i a, uint64_t where) {
    return _mm512_mask_add_epi8(a, where, a, _mm512_set1_epi8(1));
  }
  static uint64_t greater(__m512i a, __m512i b) { return _mm512_cmpgt_epu8_mask(a, b); }
  static __m512i compress(uint64_t keep, __m512i w) { return _mm512_maskz_compress_epi8(keep, w); }
};

// Bits of the elements that stay.
template <class L>
uint64_t kept(__m512i s) {
  // Where a rotation by r brings an earlier element, which goes first if it is as large: the last r of four.
  constexpr uint64_t kLast1 = 0x8888888888888888, kLast2 = 0xcccccccccccccccc,
                     kLast3 = 0xeeeeeeeeeeeeeeee;
  const uint64_t a = L::greater(L::plus_one(L::template rotate<1>(s), kLast1), s);
  const uint64_t b = L::greater(L::plus_one(L::template rotate<2>(s), kLast2), s);
  const uint64_t c = L::greater(L::plus_one(L::template rotate<3>(s), kLast3), s);
  return ~((a & b) | (c & (a | b)));  // with two before it, it is pruned
}

// Masks to codes, where they lie.
void encode(uint8_t* indices, int64_t bytes) {
  constexpr CodeTable codes;
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(codes.of)));
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < bytes; i += 64) {
    const __mmask64 inside = bytes - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (bytes - i)) - 1;
    const __m512i masks = _mm512_maskz_loadu_epi8(inside, indices + i);
    const __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(masks, low));
    const __m512i odd =
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(masks, 4), low));
    _mm512_mask_storeu_epi8(indices + i, inside, _mm512_or_si512(even, _mm512_slli_epi16(odd, 4)));
  }
}

template <class T>
bool row(const void* from, int64_t K, void* to, uint8_t* indices) {
  using L = Lanes<T>;
  constexpr int64_t kLanes = 64 / sizeof(T);
  const T* weight = static_cast<const T*>(from);
  T* values = static_cast<T*>(to);
  __m512i most = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    const __m512i w = _mm512_loadu_si512(weight + k);
    const __m512i s = L::score(w);
    most = L::max(most, s);
    const uint64_t keep = kept<L>(s);
    // Half of them, exactly.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k / 2),
                        _mm512_castsi512_si256(L::compress(keep, w)));
    std::memcpy(indices + k / 8, &keep, size_t(kLanes / 8));
  }
  encode(indices, k / 8);
  bool sound = true;
  if (Score24<T>::kInf != 0) {
    alignas(64) T lanes[kLanes];
    _mm512_store_si512(lanes, most);
    for (const T& lane : lanes) sound = sound && score24(lane) <= Score24<T>::kInf;
  }
  return sparse24_groups(weight, k, K, values, indices) && sound;
}

}  // namespace

bool sparse24_row_avx512(const void* weight, tt_dtype dtype, int64_t K, void* values,
                         uint8_t* indices) {
  switch (dtype) {
    case TT_F32: return row<float>(weight, K, values, indices);
    case TT_BF16: return row<bf16>(weight, K, values, indices);
    case TT_F16: return row<fp16>(weight, K, values, indices);
    default: return row<int8_t>(weight, K, values, indices);
  }
}

}  // namespace trimtab
