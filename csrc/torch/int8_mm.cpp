// out [M, N] = int8_mm(a [M, K] int8, b [N, K] int8 or packed, a_scale [M], b_scale [N], bias [N]);
// int8 out has out_scale [1]
#include <trimtab/int8_mm.h>

#include "adapter.h"
#include "cuda.h"
#include "epilogue.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_mm";

void run_cpu(const Tensor& a, const Tensor& b, const Tensor& a_scale, const EpilogueArgs& epilogue,
             const Tensor& out) {
  const Rows rows(a);
  const PackedWeight weight(kOp, b, epilogue.N, rows.K);
  const tt_epilogue into = epilogue.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_mm(static_cast<const int8_t*>(rows.data), rows.row_stride,
                          static_cast<const float*>(a_scale.const_data_ptr()), weight.data, rows.M,
                          weight.N, rows.K, &into, &pool));
}

void run_cuda(const Tensor& a, const Tensor& b, const Tensor& a_scale, const EpilogueArgs& epilogue,
              const Tensor& out) {
  const CudaCall call(kOp, epilogue.place);
  const Rows rows = cuda_rows(a, /*apart=*/true);
  const Rows weight = cuda_weight(kOp, b, epilogue.N, rows.K);
  const tt_epilogue into = epilogue.into(out);
  const Workspace workspace(call, call.library.int8_mm_workspace(rows.M, weight.M, rows.K));
  check_status(call.library.int8_mm(static_cast<const int8_t*>(rows.data), rows.row_stride,
                                    static_cast<const float*>(a_scale.const_data_ptr()),
                                    static_cast<const int8_t*>(weight.data), weight.row_stride,
                                    rows.M, weight.M, rows.K, &into, workspace.data, call.stream));
}

// What both overloads check; the device of a is that of all.
struct Call {
  Place place;
  EpilogueArgs epilogue;

  Call(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
       const std::optional<Tensor>& bias, int64_t activation, ScalarType out_dtype,
       const std::optional<Tensor>& out_scale)
      : place(place_of(a)), epilogue(kOp, "b_scale", b_scale, bias, activation, place) {
    check_tensor(kOp, "a", a, ScalarType::Char, 2, place);
    check_tensor(kOp, "weight", b, ScalarType::Char, -1, place);
    check_tensor(kOp, "a_scale", a_scale, ScalarType::Float, 1, place);
    TT_CHECK(a_scale.numel() == a.sizes()[0] && a_scale.is_contiguous(), kOp,
             ": expected contiguous a_scale [M=", a.sizes()[0], "], got ", describe(a_scale));
    epilogue.take_out_scale(kOp, out_dtype, out_scale);
  }

  bool triton() const { return place.is_cuda() && !cuda_serves(kOp, place); }

  void run(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& out) const {
    (place.is_cuda() ? run_cuda : run_cpu)(a, b, a_scale, epilogue, out);
  }
};

Tensor triton(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
              const std::optional<Tensor>& bias, int64_t activation, ScalarType dtype,
              const std::optional<Tensor>& out_scale) {
  const std::optional<ScalarType> out_dtype = dtype;
  const auto results = call_overload("trimtab::int8_mm", "triton", a, b, a_scale, b_scale, bias,
                                     activation, out_dtype, out_scale);
  return torch::stable::detail::to<Tensor>(results[0]);
}

Tensor int8_mm(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
               std::optional<Tensor> bias, int64_t activation, std::optional<ScalarType> out_dtype,
               std::optional<Tensor> out_scale) {
  const ScalarType dtype = out_dtype.value_or(ScalarType::BFloat16);
  const Call call(a, b, a_scale, b_scale, bias, activation, dtype, out_scale);
  if (call.triton()) return triton(a, b, a_scale, b_scale, bias, activation, dtype, out_scale);
  const Tensor out = empty_rows(a, call.epilogue.N, dtype);
  call.run(a, b, a_scale, out);
  return out;
}

void int8_mm_out(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> out_scale,
                 Tensor out) {
  const ScalarType dtype = out.scalar_type();
  const Call call(a, b, a_scale, b_scale, bias, activation, dtype, out_scale);
  const int64_t sizes[] = {a.sizes()[0], call.epilogue.N};
  check_out(kOp, "out", out, dtype, sizes, 2, call.place);
  if (call.triton()) {
    torch::stable::copy_(out, triton(a, b, a_scale, b_scale, bias, activation, dtype, out_scale));
    return;
  }
  call.run(a, b, a_scale, out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None, Tensor? out_scale=None) -> Tensor");
  m.def(
      "int8_mm.triton(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None, Tensor? out_scale=None) -> Tensor");
  m.def(
      "int8_mm.out(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "int activation=0, Tensor? out_scale=None, *, Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("int8_mm", TORCH_BOX(&int8_mm));
  m.impl("int8_mm.out", TORCH_BOX(&int8_mm_out));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("int8_mm", TORCH_BOX(&int8_mm));
  m.impl("int8_mm.out", TORCH_BOX(&int8_mm_out));
}

}  // namespace trimtab
