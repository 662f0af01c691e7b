// quantize_affine and its inverse: spans of groups over threads, a span by the instruction set's kernel.
#include <trimtab/quantize_affine.h>

#include <algorithm>

#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/quantize_affine_kernels.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

const AffineKernel& affine_kernel(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return kAffineAvx512;
  return isa == TT_ISA_SCALAR ? kAffineScalar : kAffineAvx2;
}

tt_status check(const char* op, const char* floats, const void* data, tt_dtype dtype, int64_t M,
                int64_t K, const tt_affine* codes) {
  if (codes == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: the tt_affine is NULL", op);
  if (dtype_size(dtype) == 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected %s of float32, bfloat16 or float16, got dtype %d", op, floats,
                     dtype);
  }
  if (M < 0 || K < 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld K=%lld", op,
                     (long long)M, (long long)K);
  }
  if (codes->group < 1) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected group_size >= 1, got %lld", op,
                     (long long)codes->group);
  }
  if (M > 0 && (codes->scale == nullptr || codes->zero_point == nullptr ||
                (K > 0 && (codes->q == nullptr || data == nullptr)))) {
    return set_error(TT_INVALID_ARGUMENT, "%s: %s, q, scale or zero_point is NULL", op, floats);
  }
  return TT_OK;
}

// Calls body(row, its first column, span) for spans of whole groups, each about 64 K elements or a row:
// 10 us, several times what waking a thread costs.
template <class Body>
void for_each_span(const tt_affine& codes, int64_t M, int64_t K, float levels,
                   const tt_parallel* parallel, Body&& body) {
  constexpr int64_t kTask = 65536;
  const int64_t groups = tt_affine_groups(K, codes.group);
  const int64_t group = std::min(codes.group, std::max<int64_t>(K, 1));
  const int64_t span_groups = std::min(groups, std::max<int64_t>(kTask / group, 1));
  const int64_t spans = (groups + span_groups - 1) / span_groups;  // of a row
  const int64_t spans_a_task = std::max<int64_t>(kTask / (span_groups * group), 1);
  const int64_t all = M * spans;
  const tt_parallel pool = pool_or_serial(parallel);
  parallel_run(pool, (all + spans_a_task - 1) / spans_a_task, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * spans_a_task, all);
    for (int64_t s = task * spans_a_task; s < end; ++s) {
      const int64_t m = s / spans, g = s % spans * span_groups, k = g * group;
      body(m, k,
           AffineSpan{std::min(span_groups * group, K - k), group, levels,
                      codes.q + m * codes.q_stride + k, codes.scale + m * groups + g,
                      codes.zero_point + m * groups + g});
    }
  });
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_affine_groups(int64_t K, int64_t group) {
  if (K <= 0 || group <= 0) return 1;
  return (K - 1) / group + 1;
}

tt_status tt_quantize_affine(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                             int64_t K, const tt_affine* to, const tt_parallel* parallel) {
  tt_status status = check("quantize_affine", "x", x, x_dtype, M, K, to);
  if (status != TT_OK) return status;
  if (to->bits < 2 || to->bits > 8) {
    return set_error(TT_INVALID_ARGUMENT, "quantize_affine: expected bits in 2..8, got %d",
                     to->bits);
  }
  tt_isa isa;
  status = current_isa(&isa);
  if (status != TT_OK) return status;
  if (K == 0) {  // one group a row, of nothing
    std::fill(to->scale, to->scale + M, 0.0f);
    std::fill(to->zero_point, to->zero_point + M, uint8_t(0));
    return TT_OK;
  }
  const AffineKernel& kernel = affine_kernel(isa);
  const float levels = float((1 << to->bits) - 1);
  const char* from = static_cast<const char*>(x);
  const int size = dtype_size(x_dtype);
  for_each_span(*to, M, K, levels, parallel, [&](int64_t m, int64_t k, const AffineSpan& span) {
    kernel.quantize(from + (m * x_stride + k) * size, x_dtype, span);
  });
  return TT_OK;
}

tt_status tt_dequantize_affine(const tt_affine* from, int64_t M, int64_t K, void* out,
                               tt_dtype out_dtype, int64_t out_stride,
                               const tt_parallel* parallel) {
  tt_status status = check("dequantize_affine", "out", out, out_dtype, M, K, from);
  if (status != TT_OK) return status;
  tt_isa isa;
  status = current_isa(&isa);
  if (status != TT_OK || K == 0) return status;
  const AffineKernel& kernel = affine_kernel(isa);
  const int size = dtype_size(out_dtype);
  for_each_span(*from, M, K, 0.0f, parallel, [&](int64_t m, int64_t k, const AffineSpan& span) {
    kernel.dequantize(span, static_cast<char*>(out) + (m * out_stride + k) * size, out_dtype);
  });
  return TT_OK;
}
