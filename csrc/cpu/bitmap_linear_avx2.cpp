#include "cpu/bitmap_walk.h"
#include "cpu/f32x8.h"

namespace trimtab {

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
