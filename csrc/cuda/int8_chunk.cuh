// 16 bytes of an int8 row from any address, where cp.async and 16-byte loads do not serve.
#pragma once
#include "cuda/ptx.cuh"

namespace trimtab {
namespace {

// Bytes k .. k + 15 of a row of K bytes; zeros from K on. Nothing outside the row is read.
TT_DEVICE Bytes16 load_chunk_bytes(const int8_t* row, int k, int K) {
  Bytes16 chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = k + 4 * i + j;
      if (at < K) word |= uint32_t(uint8_t(load_global(row + at))) << (8 * j);
    }
    chunk.word[i] = word;
  }
  return chunk;
}

// The same for 16 <= k <= K - 32 (any k <= K - 16 where pointer and stride are multiples of 16, kAligned):
// from the two aligned 16 bytes that hold it, 2 loads and 20 shifts and selects instead of 16 loads. No
// branch, so that the loads of several chunks are on the way together. L1 may keep what they share.
template <bool kAligned>
TT_DEVICE Bytes16 load_chunk_inside(const int8_t* row, int k) {
  if constexpr (kAligned) return load16(row + k);
  const int off = int(reinterpret_cast<uintptr_t>(row + k) % 16);
  const Bytes16* aligned = reinterpret_cast<const Bytes16*>(row + (k - off));
  const Bytes16 low = load_global(aligned), high = load_global(aligned + 1);
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = low.word[i];
    w[i + 4] = high.word[i];
  }
  // Left by off = 8 bit3 + 4 bit2 + (0 to 3) bytes.
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = off & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = off & 4 ? w[i + 1] : w[i];
  Bytes16 chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    chunk.word[i] = uint32_t((uint64_t(w[i + 1]) << 32 | w[i]) >> (off % 4 * 8));
  return chunk;
}

// Any chunk, by the shortest way.
template <bool kAligned>
TT_DEVICE Bytes16 load_chunk(const int8_t* row, int k, int K) {
  const bool inside = kAligned ? k + 16 <= K : k >= 16 && k + 32 <= K;
  return inside ? load_chunk_inside<kAligned>(row, k) : load_chunk_bytes(row, k, K);
}

}  // namespace
}  // namespace trimtab
