// mma.sp on the SIMT machine: the fragments of csrc/cuda/ptx.cuh, spread to whole matrices and multiplied.
#pragma once
#include "math/dtypes.h"
#include "simt/core.h"

namespace trimtab {
namespace {

template <class Sum>
struct SparseOperand {
  Sum* d;
  const uint32_t *a, *b;
  uint32_t e;
  const simt::Where* where;
};

// Where the two kept elements of a group lie, from its four bits. Equal or falling ones are undefined.
inline void check_positions(uint32_t bits, const char* name, const simt::Where& where) {
  if ((bits & 3) >= (bits >> 2 & 3))
    simt::fault(where, "%s: metadata of positions %u, %u, expected rising ones", name, bits & 3,
                bits >> 2 & 3);
}

// D[16][8] += A B^T with A's kept elements `kept(row, i)`, i < K / 2, their groups' bits(row, group), and
// b(column, k). The order of a sum is the seed's, as in mma_bf16.
template <int kK, class Sum, class Kept, class Bits, class B, class D>
inline void sparse_product(const Kept& kept, const Bits& bits, const B& b, const D& d) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      Sum& sum = d(row, column);
      for (int at = 0; at < kK / 2; ++at) {
        const int i = at ^ int(simt::machine.seed % (kK / 2));
        const uint32_t position = bits(row, i / 2) >> (i % 2 * 2) & 3;
        sum += Sum(kept(row, i)) * Sum(b(column, i / 2 * 4 + int(position)));
      }
    }
}

template <class T>
inline float half_of(uint32_t word, int half) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * half))});
}

template <class T, int kSelect>
inline void mma_sp_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e,
                      const char* name, const simt::Where& where) {
  static_assert(kSelect == 0 || kSelect == 1, "two lanes of four hand over metadata");
  using Operand = SparseOperand<float>;
  const auto execute = [](simt::Operands<Operand> lane) {
    const auto bits = [&](int row, int group) {  // lane t hands over columns 16 (t % 2) ..
      const uint32_t e = lane[unsigned(4 * (row % 8) + 2 * kSelect + group / 4)]->e;
      return e >> (16 * (row / 8) + 4 * (group % 4)) & 15;
    };
    for (int row = 0; row < 16; ++row)
      for (int group = 0; group < 8; ++group)
        check_positions(bits(row, group), "mma_sp", *lane[0]->where);
    sparse_product<32, float>(
        [&](int row, int i) {
          return half_of<T>(lane[unsigned(4 * (row % 8) + i % 8 / 2)]->a[row / 8 + 2 * (i / 8)],
                            i % 2);
        },
        bits,
        [&](int column, int k) {
          return half_of<T>(lane[unsigned(4 * column + k % 8 / 2)]->b[k / 8], k % 2);
        },
        [&](int row, int column) -> float& {
          return lane[unsigned(4 * (row % 8) + column / 2)]->d[2 * (row / 8) + column % 2];
        });
  };
  Operand mine = {d, a, b, e, &where};
  simt::meet_warp(~0u, mine, execute, name, where);
}

template <int kSelect>
TT_DEVICE void mma_sp_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                           uint32_t e, SIMT_WHERE) {
  mma_sp_16<bf16, kSelect>(d, a, b, e, "mma_sp_bf16", where);
}

template <int kSelect>
TT_DEVICE void mma_sp_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                           uint32_t e, SIMT_WHERE) {
  mma_sp_16<fp16, kSelect>(d, a, b, e, "mma_sp_fp16", where);
}

TT_DEVICE void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t e, SIMT_WHERE) {
  using Operand = SparseOperand<int32_t>;
  const auto execute = [](simt::Operands<Operand> lane) {
    const auto byte = [](uint32_t word, int i) { return int8_t(word >> (8 * i)); };
    const auto bits = [&](int row, int group) {
      const uint32_t e = lane[unsigned(4 * (row % 8) + 2 * (group / 8) + row / 8)]->e;
      return e >> (4 * (group % 8)) & 15;
    };
    for (int row = 0; row < 16; ++row)
      for (int group = 0; group < 16; ++group)
        check_positions(bits(row, group), "mma_sp", *lane[0]->where);
    sparse_product<64, int32_t>(
        [&](int row, int i) {
          return byte(lane[unsigned(4 * (row % 8) + i % 16 / 4)]->a[row / 8 + 2 * (i / 16)], i % 4);
        },
        bits,
        [&](int column, int k) {
          return byte(lane[unsigned(4 * column + k % 16 / 4)]->b[k / 16], k % 4);
        },
        [&](int row, int column) -> int32_t& {
          return lane[unsigned(4 * (row % 8) + column / 2)]->d[2 * (row / 8) + column % 2];
        });
  };
  Operand mine = {d, a, b, e, &where};
  simt::meet_warp(~0u, mine, execute, "mma_sp_s8", where);
}

}  // namespace
}  // namespace trimtab
