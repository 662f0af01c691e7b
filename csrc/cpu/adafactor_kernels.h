// The loops of adafactor over a block of at most kOptimBlock floats in L1, one row an instruction set. A block is
// [rows, columns] of a matrix without gaps, or n adjacent elements of a tensor from a multiple of
// kOptimBlock on.
#pragma once
#include <cstdint>

#include "math/adafactor.h"

namespace trimtab {

// The factors of a tensor's matrices, [batch * rows] and [batch * columns].
struct AdafactorFactors {
  const float *row, *column;
  int64_t rows, columns;
};

struct AdafactorKernels {
  // row_sums[r] += sum of g^2 over a row, column_sums[c] += over a column
  void (*square_sums)(const float* g, int64_t rows, int64_t columns, double* row_sums,
                      float* column_sums);
  // Elements begin .. begin + n - 1: squares[0] += |p|^2, squares[1] += |direction|^2
  void (*direction_squares)(const float* p, const float* g, const AdafactorFactors& factors,
                            int64_t begin, int64_t n, float limit, double* squares);
  void (*update)(float* p, const float* g, const AdafactorFactors& factors, int64_t begin,
                 int64_t n, const AdafactorConstants& constants);
  // x[i] = lerp(x[i], float(sums[i] / count), weight)
  void (*average)(float* x, const double* sums, double count, double weight, int64_t n);
  void (*average_squares)(float* variance, const float* g, double weight, int64_t n);
  void (*vector_squares)(const float* p, const float* g, const float* variance, float limit,
                         double* squares, int64_t n);
  void (*vector_update)(float* p, const float* g, const float* variance,
                        const AdafactorConstants& constants, int64_t n);
};

AdafactorKernels adafactor_kernels_scalar();
AdafactorKernels adafactor_kernels_avx2();
AdafactorKernels adafactor_kernels_avx512();

}  // namespace trimtab
