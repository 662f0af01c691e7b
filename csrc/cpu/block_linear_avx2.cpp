// AVX2: a panel's 16 m are two registers. int8 as in int8_mm_avx2.cpp: vpmaddwd of int16 pairs, exact.
#include <immintrin.h>

#include "cpu/block_linear_lanes.h"

namespace trimtab {
namespace {

template <class T>
struct Float {
  using Weight = T;
  using X = __m256;
  using Acc = __m256;
  using W = __m256;
  static constexpr int kVectors = 2, kTileN = 6, kTileP = 1;
  static constexpr bool kUnsigned = false;
  static Acc begin(int32_t) { return _mm256_setzero_ps(); }
  static X load(const char* p) { return _mm256_load_ps(reinterpret_cast<const float*>(p)); }
  static W broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static W broadcast(const bf16* p) { return _mm256_set1_ps(to_float(*p)); }
  static W broadcast(const fp16* p) {
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(p->bits)));
  }
  static Acc dot(Acc acc, X x, W w) { return _mm256_fmadd_ps(x, w, acc); }
  static void store(char* p, Acc acc) { _mm256_store_ps(reinterpret_cast<float*>(p), acc); }
};

struct Int8 {
  using Weight = int8_t;
  struct Pairs {
    __m256i even, odd;  // (k0, k2) and (k1, k3) as int16
  };
  using X = Pairs;
  using W = Pairs;
  using Acc = __m256i;
  static constexpr int kVectors = 2, kTileN = 3, kTileP = 1;
  static constexpr bool kUnsigned = false;
  static Acc begin(int32_t start) { return _mm256_set1_epi32(start); }
  static Pairs widen(__m256i four) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), _mm256_srai_epi16(four, 8)};
  }
  static X load(const char* p) {
    return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return broadcast_dword(four);
  }
  static W broadcast_dword(int32_t four) { return widen(_mm256_set1_epi32(four)); }
  static Acc dot(Acc acc, X x, W w) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x.even, w.even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(x.odd, w.odd));
  }
  static void store(char* p, Acc acc) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), acc); }
};

}  // namespace

BlockKernel block_kernel_avx2(const tt_block_weight& weight) {
  return lanes_kernel<Float, Int8>(weight);
}

}  // namespace trimtab
