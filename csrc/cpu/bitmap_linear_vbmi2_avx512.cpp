#include <immintrin.h>

#include "cpu/bitmap_kernels.h"

namespace trimtab {

const int8_t* bitmap_expand_vbmi2_avx512(uint64_t word, const int8_t* values, int8_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi8(word, values));
  return values + __builtin_popcountll(word);
}

}  // namespace trimtab
