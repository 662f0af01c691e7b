// The sparse product of a warpgroup: a's kept elements spread by their metadata, one product of 32 bytes a row of
// them and 64 bytes a row of b.
#pragma once
#include "math/dtypes.h"
#include "simt/sm90_state.h"
#include "simt/tma.h"

namespace simt {

// `bytes` bytes of row r of an operand, the swizzle undone.
inline void load_bytes(char* to, uint32_t bytes, const char* view, const Tile& tile, uint32_t r) {
  const uint32_t row = tile.address + r / 8 * tile.stride + r % 8 * tile.width;
  for (uint32_t k = 0; k < bytes; k += 16)
    std::memcpy(to + k, view + swizzled(row + k, tile.width), 16);
}

// The four bits of a group of row r of 64, from the words that the threads handed over.
inline uint32_t group_bits(const Product& p, int r, int group) {
  const int first = 32 * (r / 16) + 4 * (r % 8), half = r % 16 / 8;
  if (p.kind == ProductKind::sparse_s8)
    return p.metadata[size_t(first + 2 * (group / 8) + half)] >> (4 * (group % 8)) & 15;
  return p.metadata[size_t(first + 2 * p.select + group / 4)] >> (16 * half + 4 * (group % 4)) & 15;
}

template <class Element, class Sum, class Widen>
void multiply_sparse(int32_t* matrix, int n, const char* view, const Product& p,
                     const Widen& widen) {
  constexpr int kKept = 32 / int(sizeof(Element)), kWide = 2 * kKept;
  Element kept[kKept];
  static Element rows[256][kWide];
  for (int j = 0; j < n; ++j)
    load_bytes(reinterpret_cast<char*>(rows[j]), 64, view, p.b, uint32_t(j));
  for (int r = 0; r < 64; ++r) {
    load_bytes(reinterpret_cast<char*>(kept), 32, view, p.a, uint32_t(r));
    int place[kKept];
    for (int i = 0; i < kKept; ++i) {
      const uint32_t bits = group_bits(p, r, i / 2);
      if ((bits & 3) >= bits >> 2)
        fault(p.where, "wgmma_sp: metadata of positions %u, %u, expected rising ones", bits & 3,
              bits >> 2);
      place[i] = i / 2 * 4 + int(bits >> (i % 2 * 2) & 3);
    }
    for (int j = 0; j < n; ++j) {
      Sum sum;
      std::memcpy(&sum, &matrix[r * n + j], 4);
      for (int at = 0; at < kKept; ++at) {
        const int i = at ^ int(machine.seed % kKept);  // in any order
        sum += Sum(widen(kept[i])) * Sum(widen(rows[j][place[i]]));
      }
      std::memcpy(&matrix[r * n + j], &sum, 4);
    }
  }
}

inline void multiply_sparse(int32_t* matrix, int n, const char* view, const Product& p) {
  using trimtab::to_float;
  if (p.kind == ProductKind::sparse_s8)
    multiply_sparse<int8_t, int32_t>(matrix, n, view, p, [](int8_t x) { return int32_t(x); });
  else if (p.kind == ProductKind::sparse_bf16)
    multiply_sparse<uint16_t, float>(matrix, n, view, p,
                                     [](uint16_t x) { return to_float(trimtab::bf16{x}); });
  else
    multiply_sparse<uint16_t, float>(matrix, n, view, p,
                                     [](uint16_t x) { return to_float(trimtab::fp16{x}); });
}

}  // namespace simt
