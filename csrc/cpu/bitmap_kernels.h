// The table of bitmap_linear's kernels: the weight is the A operand, row by row, panels of x are B.
#pragma once
#include <trimtab/bitmap_linear.h>

#include "cpu/sparse_epilogue.h"

namespace trimtab {

// One block of the product: columns [n_begin, n_end) by all row panels of a pass, over all of K.
struct BitmapBlock {
  const void* x;  // first panel; first row where BitmapKernel::row made it or x is as it came
  int64_t panel_bytes;  // of a panel or row
  int64_t rows;  // of x in these panels
  tt_bitmap weight;
  int64_t row_bytes;  // of weight.bits
  int64_t K, n_begin, n_end;  // n_begin a multiple of kSparseTileN, or of 16 with own panels
  int64_t N;  // rows of the weight: those behind n_end are often this thread's next
  int cols;  // of BitmapKernel
  int64_t x_stride;  // elements, of x as it came
};

// False: no memory for scratch.
using BitmapBlockFn = bool (*)(const BitmapBlock& block, const SparseOutput& output);

// A row of x, K elements of dtype, as a kernel of dot products reads it; scale: of int8 cells.
using BitmapRowFn = void (*)(tt_isa isa, const void* x, tt_dtype dtype, int64_t K, void* to,
                             float* scale);

constexpr int kBitmapWalkRows = 512;  // of the weight, for which the walk makes its panels once
constexpr int kBitmapDotRows = 8;  // of x that the kernels of dot products take

struct BitmapKernel {
  PanelCell cell;
  BitmapBlockFn block;
  // Multiplies zeros where nothing is kept, which Inf and NaN in float x would make NaN.
  bool dense = false;
  // Panels of one pass; more rows are done in several passes.
  int64_t max_panel_bytes = int64_t(16) << 20;
  // x as rows and not as panels, of at most kBitmapDotRows: writes one, zeros up to a multiple of 64 k.
  BitmapRowFn row = nullptr;
  // With `row`: 4 or 8 rows in one panel, 4 bytes of each in turn; 0: one row after the other.
  int cols = 0;
  // Panels that `block` makes itself, of x as it came; 0: it is given all panels of a pass.
  int own_panels = 0;
};

// The row of the table for a weight [N, K] and M rows of x; finite: x has neither Inf nor NaN.
BitmapKernel bitmap_kernel(tt_isa isa, const tt_bitmap& weight, int64_t M, int64_t N, int64_t K,
                           bool finite);

// The kept int8 weights of a word of bits -> to [64], zeros between; returns what follows them.
using BitmapExpandFn = const int8_t* (*)(uint64_t word, const int8_t* values, int8_t* to);
const int8_t* bitmap_expand_scalar(uint64_t word, const int8_t* values, int8_t* to);
const int8_t* bitmap_expand_avx2(uint64_t word, const int8_t* values, int8_t* to);
const int8_t* bitmap_expand_vbmi2_avx512(uint64_t word, const int8_t* values, int8_t* to);

// The product with int8 weights by the dense product's kernels; arguments have been checked.
tt_status bitmap_int8_expanded(const char* op, tt_isa isa, const void* x, tt_dtype x_dtype,
                               int64_t x_stride, const tt_bitmap& weight, int64_t M, int64_t N,
                               int64_t K, const tt_epilogue& epilogue, const tt_parallel& pool,
                               int threads);

// Defined in bitmap_linear_<isa>.cpp.
bool bitmap_block_f32_scalar(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_bf16_scalar(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_f16_scalar(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_f32_avx2(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_bf16_avx2(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_f16_avx2(const BitmapBlock&, const SparseOutput&);
bool bitmap_dots_f32_avx512(const BitmapBlock&, const SparseOutput&);
bool bitmap_dots_bf16_vbmi2_avx512(const BitmapBlock&, const SparseOutput&);
bool bitmap_dots_int8_vbmi2_avx512(const BitmapBlock&, const SparseOutput&);
void bitmap_row_bf16_avx512(const void* x, int64_t K, void* to);
bool bitmap_block_f32_avx512(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_bf16_avx512(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_f16_avx512(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_bf16_amx(const BitmapBlock&, const SparseOutput&);
bool bitmap_block_int8_amx(const BitmapBlock&, const SparseOutput&);

}  // namespace trimtab
