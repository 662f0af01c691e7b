// The table of bitmap_linear's kernels: the weight is the A operand, row by row, panels of x are B.
#pragma once
#include <trimtab/bitmap_linear.h>

#include "cpu/sparse_epilogue.h"

namespace trimtab {

// One block of the product: columns [n_begin, n_end) by all row panels of a pass, over all of K.
struct BitmapBlock {
  const void* x;  // first panel
  int64_t panel_bytes;
  int64_t rows;  // of x in these panels
  tt_bitmap weight;
  int64_t row_bytes;  // of weight.bits
  int64_t K, n_begin, n_end;  // n_begin a multiple of kSparseTileN
};

// Sums of columns [n, n + cols) and panel p's rows go to `store`.
using BitmapBlockFn = void (*)(const BitmapBlock& block, const SparseOutput& output);

struct BitmapKernel {
  PanelCell cell;
  BitmapBlockFn block;
};

// The row of the table for weights of that dtype and M rows of x.
BitmapKernel bitmap_kernel(tt_isa isa, tt_dtype dtype, int64_t M);

// Defined in bitmap_linear_<isa>.cpp.
void bitmap_block_f32_scalar(const BitmapBlock&, const SparseOutput&);
void bitmap_block_bf16_scalar(const BitmapBlock&, const SparseOutput&);
void bitmap_block_f16_scalar(const BitmapBlock&, const SparseOutput&);
void bitmap_block_int8_scalar(const BitmapBlock&, const SparseOutput&);

}  // namespace trimtab
