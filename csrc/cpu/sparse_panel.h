// Activations as the sparse products read them: x [M, K] in panels of 16 rows, transposed.
//
//   panel[k / e][16 m][e]     e = 1 float, 2 bf16 or 4 int8: what fills a dword
//
// Rows beyond M are zero, and so is K up to the next 64 bytes of a row: a step of 16 dwords of k is 1 KiB
// and is a B tile of AMX; 64 bytes are a vector of 16 m, ready for fma, vdpbf16ps or vpdpbusd with one
// weight (or pair or four of them) broadcast. For int8 it is the layout of tt_int8_pack.
#pragma once
#include "cpu/int8_kernels.h"
#include "cpu/int8_weight_mm_kernels.h"

namespace trimtab {

constexpr int kSparseM = 16;  // rows of x in a panel
constexpr int64_t kSparseStepBytes = 1024;  // 64 bytes of 16 rows

enum class PanelCell {
  kF32,  // x widened
  kBf16,  // x as it is; for x of bf16 alone
  kInt8,  // quantize_int8 of the row
  kUint8,  // the same + 128: vpdpbusd takes unsigned by signed. Padding is then anything
};

constexpr int panel_cell_bytes(PanelCell cell) {
  return cell == PanelCell::kF32 ? 4 : cell == PanelCell::kBf16 ? 2 : 1;
}

// Steps of 64 bytes a row has.
constexpr int64_t panel_steps(int64_t K, PanelCell cell) {
  return (K * panel_cell_bytes(cell) + 63) / 64;
}

// What an instruction set brings to every sparse product.
struct SparseLanes {
  // x [rows <= 16, K], rows x_stride elements apart -> panel, panel_steps() * kSparseStepBytes bytes
  // scale [rows]: the rows' scales, for int8 cells; else NULL
  void (*fill)(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K, PanelCell cell,
               void* panel, float* scale);
  // The same widened, for a part of K: x [rows <= 16, count <= 64] -> to [count][16], `to_stride` floats
  // from one k to the next, so that panels can stand side by side. count is rounded up to 16, with zeros.
  void (*fill_part)(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int count, float* to,
                    int64_t to_stride);
  // Whether x [rows, K] holds neither NaN nor Inf.
  bool (*finite)(const void* x, tt_dtype dtype, int64_t x_stride, int64_t rows, int64_t K);
  // 16 x 16 dwords, rows `stride` dwords apart
  void (*transpose)(const void* from, int64_t from_stride, void* to, int64_t to_stride);
  EpilogueFn (*int8_epilogue)(tt_activation activation, tt_dtype out_dtype);
  WeightEpilogueFn (*float_epilogue)(tt_activation activation, tt_dtype out_dtype);
};

// Defined in sparse_panel_<isa>.cpp.
extern const SparseLanes kSparseScalar, kSparseAvx2, kSparseAvx512;

const SparseLanes& sparse_lanes(tt_isa isa);

}  // namespace trimtab
