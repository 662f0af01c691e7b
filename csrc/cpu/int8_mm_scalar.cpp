// Portable C++: any CPU, and the plain statement of what the other kernels compute.
#include <trimtab/int8_mm.h>

#include "cpu/int8_epilogue.h"
#include "cpu/int8_panel.h"
#include "cpu/quantize_int8.h"
#include "math/f32x1.h"

namespace trimtab {
namespace {
constexpr int kMr = 4;
}

void int8_pack_a_scalar(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel) {
  pack_a<kMr, Cell::kInt8>(a, a_stride, rows, K, panel);
}

void int8_quantize_a_scalar(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                            void* panel, float* scale) {
  quantize_a<F32x1, kMr, Cell::kInt8>(x, dtype, x_stride, rows, K, panel, scale);
}

void int8_block_scalar(const Int8Block& s) {
  const int64_t b_panel = packed_panel_bytes(s.K);
  int32_t acc[kMr * kMaxTileN];
  for_each_tile<kPanelN>(s, [&](int64_t m, int rows, int64_t n, int cols) {
    const int8_t* a = static_cast<const int8_t*>(s.a) + m / s.mr * s.a_panel_bytes;
    const int8_t* b = s.b + n / kPanelN * b_panel;
    for (int row = 0; row < rows; ++row) {
      int32_t sum[kPanelN] = {};
      for (int64_t k = 0; k < s.K; ++k) {
        const int32_t value = a[(k / kStepK * kMr + row) * kStepK + k % kStepK];
        const int8_t* column = b + k / 4 * 64 + k % 4;
        for (int j = 0; j < kPanelN; ++j) sum[j] += value * column[j * 4];
      }
      for (int j = 0; j < kPanelN; ++j) acc[row * kMaxTileN + j] = sum[j];
    }
    s.epilogue(acc, kMaxTileN, rows, cols, s.a_scale + m, s.b_scale + n, s.bias + n, s.inverse,
               tile_out(s, m, n), s.out_stride);
  });
}

EpilogueFn int8_epilogue_scalar(tt_activation activation, tt_dtype out_dtype) {
  return choose_epilogue<F32x1>(activation, out_dtype);
}

}  // namespace trimtab
