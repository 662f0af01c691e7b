// out [M, N] = int8_mm(a [M, K] int8, b [N, K] int8 or packed, a_scale [M], b_scale [N], bias [N])
#include <trimtab/int8_mm.h>

#include "adapter.h"
#include "epilogue.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_mm";

void check(const Tensor& a, const Tensor& a_scale) {
  check_tensor(kOp, "a", a, ScalarType::Char, 2);
  check_tensor(kOp, "a_scale", a_scale, ScalarType::Float, 1);
  TT_CHECK(a_scale.numel() == a.sizes()[0] && a_scale.is_contiguous(), kOp,
           ": expected contiguous a_scale [M=", a.sizes()[0], "], got ", describe(a_scale));
}

void run(const Tensor& a, const Tensor& b, const Tensor& a_scale, const EpilogueArgs& epilogue,
         const Tensor& out) {
  const Rows rows(a);
  const PackedWeight weight(kOp, b, epilogue.N, rows.K);
  const tt_epilogue into = epilogue.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_mm(static_cast<const int8_t*>(rows.data), rows.row_stride,
                          static_cast<const float*>(a_scale.const_data_ptr()), weight.data, rows.M,
                          weight.N, rows.K, &into, &pool));
}

Tensor int8_mm(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
               std::optional<Tensor> bias, int64_t activation,
               std::optional<ScalarType> out_dtype) {
  check(a, a_scale);
  const EpilogueArgs epilogue(kOp, "b_scale", b_scale, bias, activation);
  const Tensor out = empty_rows(a, epilogue.N, out_dtype.value_or(ScalarType::BFloat16));
  float_dtype(kOp, "out", out);
  run(a, b, a_scale, epilogue, out);
  return out;
}

void int8_mm_out(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 std::optional<Tensor> bias, int64_t activation, Tensor out) {
  check(a, a_scale);
  const EpilogueArgs epilogue(kOp, "b_scale", b_scale, bias, activation);
  const int64_t sizes[] = {a.sizes()[0], epilogue.N};
  float_dtype(kOp, "out", out);
  check_out(kOp, "out", out, out.scalar_type(), sizes, 2);
  run(a, b, a_scale, epilogue, out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_mm.out(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "int activation=0, *, Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  m.impl("int8_mm", TORCH_BOX(&int8_mm));
  m.impl("int8_mm.out", TORCH_BOX(&int8_mm_out));
}

}  // namespace trimtab
