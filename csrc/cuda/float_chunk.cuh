// Eight adjacent floats of a row, of any dtype and alignment: 16 bytes of bf16 or fp16, 32 of fp32.
#pragma once
#include <type_traits>

#include "cuda/ptx.cuh"
#include "math/dtypes.h"
#include "math/f32x1.h"

namespace trimtab {
namespace {

constexpr int kChunk = 8;

// Eight elements of a row as they lie in memory.
template <class T>
struct RawChunk {
  Bytes16 part[sizeof(T) / 2];
};

// Eight elements, aligned to 16 bytes; zeros where they do not exist.
template <class T>
TT_DEVICE void load_whole_chunk(const T* from, bool exists, RawChunk<T>& raw) {
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
    raw.part[i] = {};
    if (exists) raw.part[i] = load16(from + i * 16 / int(sizeof(T)));
  }
}

// Elements k .. k + 7 of a row of K; zeros from K on. kWide: the row is aligned to 16 bytes.
template <bool kWide, class T>
TT_DEVICE void load_chunk(const T* row, int64_t k, int64_t K, RawChunk<T>& raw) {
  constexpr int kParts = sizeof(T) / 2, kEach = 16 / sizeof(T);
  raw = {};
  if (kWide && k + kChunk <= K) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) raw.part[i] = load16(row + k + i * kEach);
    return;
  }
  using Bits = typename std::conditional<sizeof(T) == 4, uint32_t, uint16_t>::type;
  const Bits* bits = reinterpret_cast<const Bits*>(row);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    if (k + j >= K) continue;
    const uint32_t shift = sizeof(T) == 4 ? 0 : j % 2 * 16;
    raw.part[j / kEach].word[j * sizeof(T) / 4 % 4] |= uint32_t{load_global(bits + k + j)} << shift;
  }
}

TT_DEVICE float element(const RawChunk<float>& raw, int j) {
  return float_from_bits(raw.part[j / 4].word[j % 4]);
}
TT_DEVICE float element(const RawChunk<bf16>& raw, int j) {
  return to_float(bf16{static_cast<uint16_t>(raw.part[0].word[j / 2] >> j % 2 * 16)});
}
// fp16 to fp32 in half the instructions of to_float(fp16): the bits shifted into place are the value times
// 2^-112, subnormals too, and the product is exact; the largest exponent becomes fp32's.
TT_DEVICE float element(const RawChunk<fp16>& raw, int j) {
  const uint32_t bits = raw.part[0].word[j / 2] >> j % 2 * 16, low = bits & 0x7fffu;
  const F32x1 value = F32x1(float_from_bits(low << 13)) * F32x1(0x1p112f);
  const uint32_t sign_and_top = (bits & 0x8000u) << 16 | (low >= 0x7c00u ? 0x7f800000u : 0u);
  return float_from_bits(float_bits(value.v) | sign_and_top);
}

// The rows `row_bytes` apart from `data` on all start at a multiple of `to` bytes.
inline bool aligned_rows(const void* data, int64_t row_bytes, int64_t rows, int to) {
  return reinterpret_cast<uintptr_t>(data) % to == 0 && (row_bytes % to == 0 || rows <= 1);
}

}  // namespace
}  // namespace trimtab
