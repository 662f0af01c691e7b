// What follows the sums of a sparse product. They come out as C^T, a weight row's 16 m side by side; here
// they are turned, meet the epilogue of the dense products, and reach out [M, N]. int8 results have the bits
// of int8_mm for that reason.
#pragma once
#include "cpu/sparse_panel.h"

namespace trimtab {

constexpr int kSparseTileN = 64;  // columns stored at once: kWeightTileN

struct SparseOutput {
  const SparseLanes* lanes;
  EpilogueFn int8;  // for int32 sums; NULL: they are fp32
  WeightEpilogueFn floats;
  const float* a_scale;  // [M], for int32 sums
  const float* b_scale;  // [N], for int32 sums
  const float* bias;  // [N], -0.0 where there is none: t + -0.0 is t for every t
  char* out;  // row 0, column 0 of the matrix
  int64_t out_stride;  // elements
  int out_size;  // bytes an element
};

// TT_INVALID_ARGUMENT with a message for NULLs, dtypes, activation or stride. int8: of the values.
tt_status check_sparse_epilogue(const char* op, const tt_epilogue* epilogue, bool int8, int64_t M,
                                int64_t N);

// a_scale [M]: filled later, for int8 values; bias [N]: as above.
SparseOutput sparse_output(tt_isa isa, const tt_epilogue& epilogue, bool int8, const float* a_scale,
                           const float* bias);

namespace {

// sums [cols rounded up to 16][16 m] dwords, rows `stride` dwords apart -> out[m .. m + rows, n .. n + cols]
// rows <= kSparseM, cols <= kSparseTileN
inline void sparse_store(const SparseOutput& o, const void* sums, int64_t stride, int64_t m,
                         int rows, int64_t n, int cols) {
  static_assert(kSparseTileN == kWeightTileN, "the float epilogue's row stride");
  alignas(64) uint32_t turned[kSparseM * kSparseTileN];
  const uint32_t* from = static_cast<const uint32_t*>(sums);
  for (int col = 0; col < cols; col += 16)
    o.lanes->transpose(from + col * stride, stride, turned + col, kSparseTileN);
  char* out = o.out + (m * o.out_stride + n) * o.out_size;
  if (o.int8 != nullptr) {
    o.int8(reinterpret_cast<const int32_t*>(turned), kSparseTileN, rows, cols, o.a_scale + m,
           o.b_scale + n, o.bias + n, 0.0f, out, o.out_stride);
  } else {
    o.floats(reinterpret_cast<const float*>(turned), rows, cols, o.bias + n, out, o.out_stride);
  }
}

}  // namespace
}  // namespace trimtab
