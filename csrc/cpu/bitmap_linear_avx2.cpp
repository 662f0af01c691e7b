#include "cpu/bitmap_walk.h"
#include "cpu/f32x8.h"

namespace trimtab {
namespace {

// For each byte of bits, where its eight columns find their value among those that follow each other; 0x80
// makes vpshufb write zero.
struct Places {
  alignas(64) uint8_t of[256][8] = {};
  constexpr Places() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t next = 0;
      for (int k = 0; k < 8; ++k) of[bits][k] = bits >> k & 1 ? next++ : uint8_t(0x80);
    }
  }
};
constexpr Places kPlaces;

}  // namespace

// Eight columns a shuffle. It reads eight values where fewer may be left: the last ones of a word, which
// could be the last of all, come through a copy.
const int8_t* bitmap_expand_avx2(uint64_t word, const int8_t* values, int8_t* to) {
  const int count = __builtin_popcountll(word);
  alignas(16) int8_t copy[64 + 8];
  std::memcpy(copy, values, size_t(count));
  const int8_t* from = copy;
  for (int k = 0; k < 64; k += 8) {
    const unsigned bits = word >> k & 0xff;
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i place = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[bits]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + k), _mm_shuffle_epi8(eight, place));
    from += __builtin_popcount(bits);
  }
  return values + count;
}

bool bitmap_block_f32_avx2(const BitmapBlock& s, const SparseOutput& output) {
  return walk_block<F32x8, float>(s, output);
}
bool bitmap_block_bf16_avx2(const BitmapBlock& s, const SparseOutput& output) {
  return walk_block<F32x8, bf16>(s, output);
}
bool bitmap_block_f16_avx2(const BitmapBlock& s, const SparseOutput& output) {
  return walk_block<F32x8, fp16>(s, output);
}

}  // namespace trimtab
