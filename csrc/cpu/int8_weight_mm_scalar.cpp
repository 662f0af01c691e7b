// Portable C++, and the plain statement of what the other kernels compute.
#include "cpu/int8_weight_mm.h"

namespace trimtab {
namespace {

struct Lanes1 {
  static constexpr int lanes = 1;
  using F = float;
  using V = F32x1;
  using Codes = const int8_t*;
  static Codes load_codes(const int8_t* p) { return p; }
  static F offset(F zero) { return zero; }
  static F value(Codes codes, int j, F zero) { return float(codes[j]) - zero; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
};

constexpr WeightTileFn kTiles[] = {tile<Lanes1, 1, 1>, tile<Lanes1, 2, 1>};

void block(const WeightBlock& s) {
  weight_block<16>(s, [](int rows, int) { return kTiles[rows - 1]; });
}

}  // namespace

const WeightKernel kWeightScalar = {2, fill_panel<F32x1>, block, choose_weight_epilogue<F32x1>};

}  // namespace trimtab
