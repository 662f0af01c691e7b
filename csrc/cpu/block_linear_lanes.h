// block_linear on any vector type, for blocks of any shape. Each instruction set brings D, how one weight
// meets 16 m of x:
//
//   Weight             what one step of a block's row is: float, bf16, fp16 (a step is one k), or int8_t (four)
//   Acc, X, W          registers;  kVectors of them hold 16 m
//   kUnsigned          x is int8 + 128, so sums start at -128 sum_k w
//   load(p)            one register of x
//   broadcast(p), broadcast_dword(int32)   one step of a weight row, for all m
//   dot(acc, x, w)     acc + x w
//   store(p, acc)
//   kTileN, kTileP     the tile of registers: weight rows by panels
//
// Internal linkage: included once an instruction set.
#pragma once
#include <cstring>

#include "cpu/block_linear.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int64_t kPanelSums = int64_t(kSparseTileN) * kSparseM;  // dwords

// Where a block's columns begin and end in steps of a panel, and how its first step is shifted.
template <class D>
struct BlockSteps {
  static constexpr int64_t kPerStep = sizeof(typename D::Weight) == 1 ? 4 : 1;
  int64_t first, count, shift;
  BlockSteps(int64_t k, int64_t bk)
      : first(k / kPerStep),
        count((k % kPerStep + bk + kPerStep - 1) / kPerStep),
        shift(k % kPerStep) {}
};

// Four int8 of a row of a block that does not begin or end at a multiple of four, zeros around it.
inline int32_t ragged_dword(const int8_t* row, int64_t at, int64_t bk) {
  int8_t four[4];
  for (int i = 0; i < 4; ++i) four[i] = at + i >= 0 && at + i < bk ? row[at + i] : int8_t(0);
  int32_t dword;
  std::memcpy(&dword, four, 4);
  return dword;
}

template <class D, bool kRagged>
inline typename D::W weight_step(const typename D::Weight* row, int64_t step, int64_t shift,
                                 int64_t bk) {
  if constexpr (kRagged) {
    return D::broadcast_dword(ragged_dword(row, step * 4 - shift, bk));
  } else {
    return D::broadcast(row + step * BlockSteps<D>::kPerStep);
  }
}

// sums [kRows][16 m] of each of kP panels, kPanelSums apart = rows [n, n + kRows) of a row of blocks
template <class D, int kRows, int kP, bool kRagged>
void lanes_tile(const BlockTask& t, int64_t row, int64_t n, const int32_t* start, const char* x,
                uint32_t* sums) {
  using T = typename D::Weight;
  constexpr int kV = D::kVectors, kBytes = 64 / kV;
  const tt_block_weight& w = *t.weight;
  typename D::Acc acc[kRows][kP * kV];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kP * kV; ++v) acc[r][v] = D::begin(start[r]);
  const T* values = static_cast<const T*>(w.values);
  for (int64_t b = w.crow[row]; b < w.crow[row + 1]; ++b) {
    const BlockSteps<D> steps(w.col[b] * w.bk, w.bk);
    const T* block = values + (b * w.bn + n) * w.bk;
    const char* from = x + steps.first * 64;
    for (int64_t s = 0; s < steps.count; ++s, from += 64) {
      typename D::X value[kP * kV];
      for (int p = 0; p < kP; ++p)
        for (int v = 0; v < kV; ++v)
          value[p * kV + v] = D::load(from + p * t.panel_bytes + v * kBytes);
      for (int r = 0; r < kRows; ++r) {
        const auto weight = weight_step<D, kRagged>(block + r * w.bk, s, steps.shift, w.bk);
        for (int v = 0; v < kP * kV; ++v) acc[r][v] = D::dot(acc[r][v], value[v], weight);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kP; ++p)
      for (int v = 0; v < kV; ++v)
        D::store(reinterpret_cast<char*>(sums + p * kPanelSums + r * kSparseM) + v * kBytes,
                 acc[r][p * kV + v]);
}

// -128 sum_k w of each output of the group, for u8 x; else zeros.
template <class D>
void group_start(const BlockTask& t, const BlockGroup& g, int32_t* start) {
  std::memset(start, 0, kSparseTileN * sizeof(int32_t));
  if constexpr (D::kUnsigned) {
    const tt_block_weight& w = *t.weight;
    for (int64_t row = g.row; row < g.row_end; ++row, start += w.bn) {
      for (int64_t b = w.crow[row]; b < w.crow[row + 1]; ++b) {
        const int8_t* block = static_cast<const int8_t*>(w.values) + b * w.bn * w.bk;
        for (int64_t n = g.begin; n < g.end; ++n) {
          int32_t sum = 0;
          for (int64_t k = 0; k < w.bk; ++k) sum += block[n * w.bk + k];
          start[n - g.begin] -= 128 * sum;
        }
      }
    }
  }
}

// The group's sums for kP panels.
template <class D, int kP, bool kRagged>
void lanes_panels(const BlockTask& t, const BlockGroup& g, const int32_t* start, const char* x,
                  uint32_t* sums) {
  constexpr int kRows = kP == 1 ? D::kTileN * (D::kTileP > 1 ? 2 : 1) : D::kTileN;
  const int64_t bn = t.weight->bn;
  for (int64_t row = g.row; row < g.row_end; ++row) {
    int64_t n = g.begin;
    const auto at = [&] { return (row - g.row) * bn + n - g.begin; };
    for (; n + kRows <= g.end; n += kRows)
      lanes_tile<D, kRows, kP, kRagged>(t, row, n, start + at(), x, sums + at() * kSparseM);
    for (; n < g.end; ++n)
      lanes_tile<D, 1, kP, kRagged>(t, row, n, start + at(), x, sums + at() * kSparseM);
  }
}

template <class D, bool kRagged>
bool lanes_run(const BlockTask& t) {
  alignas(64) uint32_t sums[kBlockPanels * kPanelSums];
  const int64_t panels = (t.rows + kSparseM - 1) / kSparseM;
  for_each_group(t, [&](const BlockGroup& g) {
    int32_t start[kSparseTileN];
    group_start<D>(t, g, start);
    int64_t p = 0;
    const auto at = [&] { return t.x + p * t.panel_bytes; };
    for (; p + D::kTileP <= panels; p += D::kTileP) {
      lanes_panels<D, D::kTileP, kRagged>(t, g, start, at(), sums);
      store_group(t, g, p, D::kTileP, sums, kPanelSums);
    }
    for (; D::kTileP > 1 && p < panels; ++p) {
      lanes_panels<D, 1, kRagged>(t, g, start, at(), sums);
      store_group(t, g, p, 1, sums, kPanelSums);
    }
  });
  return true;
}

// The kernel for a weight: F floats, I int8.
template <template <class> class F, class I>
BlockKernel lanes_kernel(const tt_block_weight& weight) {
  switch (weight.dtype) {
    case TT_F32: return {PanelCell::kF32, lanes_run<F<float>, false>};
    case TT_BF16: return {PanelCell::kF32, lanes_run<F<bf16>, false>};
    case TT_F16: return {PanelCell::kF32, lanes_run<F<fp16>, false>};
    default: break;
  }
  const PanelCell cell = I::kUnsigned ? PanelCell::kUint8 : PanelCell::kInt8;
  if (weight.bk % 4 == 0) return {cell, lanes_run<I, false>};
  return {cell, lanes_run<I, true>};
}

}  // namespace
}  // namespace trimtab
