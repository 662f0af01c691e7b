// out [..., N] = int8_linear(x [..., K], weight packed or [N, K] int8, weight_scale [N], bias [N])
//
// The overload "inference" is the same function without an autograd rule: a Python rule would cost more
// than a small product, so the layers call this one where no gradient can be asked for.
#include <trimtab/int8_linear.h>

#include "adapter.h"
#include "epilogue.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_linear";

void run(const Tensor& x, const Tensor& weight, const EpilogueArgs& epilogue, const Tensor& out) {
  const tt_dtype dtype = float_dtype(kOp, "x", x);
  const Rows rows(x);
  const PackedWeight packed(kOp, weight, epilogue.N, rows.K);
  const tt_epilogue into = epilogue.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_linear(rows.data, dtype, rows.row_stride, packed.data, rows.M, packed.N,
                              rows.K, &into, &pool));
}

void check_x(const Tensor& x) {
  float_dtype(kOp, "x", x);
  TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   std::optional<Tensor> bias, int64_t activation,
                   std::optional<ScalarType> out_dtype) {
  check_x(x);
  const EpilogueArgs epilogue(kOp, "weight_scale", weight_scale, bias, activation);
  const Tensor out = empty_rows(x, epilogue.N, out_dtype.value_or(x.scalar_type()));
  float_dtype(kOp, "out", out);
  run(x, weight, epilogue, out);
  return out;
}

void int8_linear_out(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                     std::optional<Tensor> bias, int64_t activation, Tensor out) {
  check_x(x);
  const EpilogueArgs epilogue(kOp, "weight_scale", weight_scale, bias, activation);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = epilogue.N;
  float_dtype(kOp, "out", out);
  check_out(kOp, "out", out, out.scalar_type(), sizes.data(), int64_t(sizes.size()));
  run(x, weight, epilogue, out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_linear.inference(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_linear.out(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, *, Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.inference", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.out", TORCH_BOX(&int8_linear_out));
}

}  // namespace trimtab
