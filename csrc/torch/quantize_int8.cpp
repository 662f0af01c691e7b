// q [..., K] int8, scale [...] fp32 = quantize_int8(x [..., K])
#include <trimtab/quantize_int8.h>

#include "adapter.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "quantize_int8";

void run(const Tensor& x, const Tensor& q, const Tensor& scale) {
  const tt_dtype dtype = float_dtype(kOp, "x", x);
  const Rows rows(x);
  const tt_parallel pool = torch_pool();
  check_status(tt_quantize_int8(rows.data, dtype, rows.row_stride, rows.M, rows.K,
                                static_cast<int8_t*>(q.mutable_data_ptr()), rows.K,
                                static_cast<float*>(scale.mutable_data_ptr()), &pool));
}

void check_x(const Tensor& x) {
  float_dtype(kOp, "x", x);
  TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x) {
  check_x(x);
  const Tensor q = empty_rows(x, x.sizes()[x.dim() - 1], ScalarType::Char);
  const Tensor scale = empty_cpu(x.sizes().data(), x.dim() - 1, ScalarType::Float);
  run(x, q, scale);
  return {q, scale};
}

void quantize_int8_out(const Tensor& x, Tensor q, Tensor scale) {
  check_x(x);
  check_out(kOp, "q", q, ScalarType::Char, x.sizes().data(), x.dim());
  check_out(kOp, "scale", scale, ScalarType::Float, x.sizes().data(), x.dim() - 1);
  run(x, q, scale);
}

}  // namespace

TT_OPS(m) {
  m.def("quantize_int8(Tensor x) -> (Tensor, Tensor)");
  m.def("quantize_int8.out(Tensor x, *, Tensor(a!) q, Tensor(b!) scale) -> ()");
}

TT_CPU_OPS(m) {
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("quantize_int8.out", TORCH_BOX(&quantize_int8_out));
}

}  // namespace trimtab
