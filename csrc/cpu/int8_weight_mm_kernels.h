// The table of int8_weight_mm's kernels: one row an instruction set.
//
// Activations are widened to fp32 and repacked into row panels, so that the four rows-by-four-k values
// a step needs are adjacent:
//
//   panel[k / 4][row][k % 4],  K padded to 4 with zeros
//
// The padding meets zero bytes of the packed weight (or minus a zero point): fma(0, w, acc) is acc,
// because a sum that starts at +0 is never -0.
#pragma once
#include <trimtab/int8_weight_mm.h>

namespace trimtab {

constexpr int kWeightTileN = 64;  // widest tile, in columns
constexpr int kWeightMr = 8;  // most rows of a panel

// Adds the bias, activates, rounds and stores a tile of sums t [rows][kWeightTileN].
using WeightEpilogueFn = void (*)(const float* t, int rows, int cols, const float* bias, void* out,
                                  int64_t out_stride);

// One block of the product: row panels by columns [n_begin, n_end), over all of K.
struct WeightBlock {
  const float* x;  // first panel
  int64_t rows, mr;  // rows in all panels; rows of each but perhaps the last
  const int8_t* b;  // the whole packed weight
  int64_t K, N, n_begin, n_end;  // n_begin a multiple of kWeightTileN
  int64_t group;  // a multiple of 4, or K
  const float* scale;  // [groups, N]
  const int8_t* zero_point;  // [groups, N], or NULL
  const float* bias;  // [N], -0.0 where there is none: t + -0.0 is t for every t
  char* out;  // row 0 of these panels, column 0 of the matrix
  int64_t out_stride;  // elements
  int out_size;  // bytes an element
  WeightEpilogueFn epilogue;
};

struct WeightKernel {
  int mr;  // most rows of a panel
  // x [rows, K] -> panel
  void (*fill)(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K, float* panel);
  void (*block)(const WeightBlock& block);
  WeightEpilogueFn (*epilogue)(tt_activation activation, tt_dtype out_dtype);
};

// Defined in int8_weight_mm_<isa>.cpp.
extern const WeightKernel kWeightScalar, kWeightAvx2, kWeightAvx512;

}  // namespace trimtab
