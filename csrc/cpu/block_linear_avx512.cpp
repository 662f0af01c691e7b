// AVX-512: a register holds a panel's 16 m. Floats by fma, int8 by vpdpbusd.
#include <immintrin.h>

#include "cpu/block_linear_lanes.h"

namespace trimtab {
namespace {

// 4 weight rows x 4 panels: 16 sums cover the latency of two fma units, 8 loads stand against 16 fma.
template <class T>
struct Float {
  using Weight = T;
  using X = __m512;
  using Acc = __m512;
  using W = __m512;
  static constexpr int kVectors = 1, kTileN = 4, kTileP = 4;
  static constexpr bool kUnsigned = false;
  static Acc begin(int32_t) { return _mm512_setzero_ps(); }
  static X load(const char* p) { return _mm512_load_ps(p); }
  static W broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static W broadcast(const bf16* p) { return _mm512_set1_ps(to_float(*p)); }
  static W broadcast(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(p->bits)));
  }
  static Acc dot(Acc acc, X x, W w) { return _mm512_fmadd_ps(x, w, acc); }
  static void store(char* p, Acc acc) { _mm512_store_ps(p, acc); }
};

struct Int8 {
  using Weight = int8_t;
  using X = __m512i;
  using Acc = __m512i;
  using W = __m512i;
  static constexpr int kVectors = 1, kTileN = 4, kTileP = 4;
  static constexpr bool kUnsigned = true;
  static Acc begin(int32_t start) { return _mm512_set1_epi32(start); }
  static X load(const char* p) { return _mm512_load_si512(p); }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static W broadcast_dword(int32_t four) { return _mm512_set1_epi32(four); }
  static Acc dot(Acc acc, X x, W w) { return _mm512_dpbusd_epi32(acc, x, w); }
  static void store(char* p, Acc acc) { _mm512_store_si512(p, acc); }
};

}  // namespace

BlockKernel block_kernel_avx512(const tt_block_weight& weight) {
  if (weight.dtype == TT_I8 && weight.bn == 1 && weight.bk == 16)
    return {PanelCell::kUint8, block_1x16_avx512};
  return lanes_kernel<Float, Int8>(weight);
}

}  // namespace trimtab
