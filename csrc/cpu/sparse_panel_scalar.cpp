#include <cstdint>

#include "math/f32x1.h"

namespace trimtab {
namespace {

void transpose_16x16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  for (int row = 0; row < 16; ++row)
    for (int col = 0; col < 16; ++col) to[col * to_stride + row] = from[row * from_stride + col];
}

}  // namespace
}  // namespace trimtab

#include "cpu/sparse_panel_lanes.h"

namespace trimtab {

const SparseLanes& sparse_lanes(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return kSparseAvx512;
  return isa == TT_ISA_SCALAR ? kSparseScalar : kSparseAvx2;
}

namespace {

WeightEpilogueFn float_epilogue(tt_activation activation, tt_dtype out_dtype) {
  return kWeightScalar.epilogue(activation, out_dtype);
}

}  // namespace

const SparseLanes kSparseScalar = {fill_sparse_panel<F32x1>, fill_part<F32x1>,
                                   all_finite<F32x1>,        transpose_dwords,
                                   int8_epilogue_scalar,     float_epilogue};

}  // namespace trimtab
