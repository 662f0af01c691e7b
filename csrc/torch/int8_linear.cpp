// out [..., N] = int8_linear(x [..., K], weight packed or [N, K] int8, weight_scale [N], bias [N]);
// int8 out has out_scale [1]
//
// The overload "inference" is the same function without an autograd rule: a Python rule would cost more
// than a small product, so the layers call this one where no gradient can be asked for. "triton" is the
// Triton implementation, which Python registers.
#include <trimtab/int8_linear.h>

#include "adapter.h"
#include "cuda.h"
#include "epilogue.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_linear";

void run_cpu(const Tensor& x, const Tensor& weight, const EpilogueArgs& epilogue,
             const Tensor& out) {
  const Rows rows(x);
  const PackedWeight packed(kOp, weight, epilogue.N, rows.K);
  const tt_epilogue into = epilogue.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_linear(rows.data, float_dtype(kOp, "x", x), rows.row_stride, packed.data,
                              rows.M, packed.N, rows.K, &into, &pool));
}

void run_cuda(const Tensor& x, const Tensor& weight, const EpilogueArgs& epilogue,
              const Tensor& out) {
  const CudaCall call(kOp, epilogue.place);
  const Rows rows = cuda_rows(x);
  const Rows b = cuda_weight(kOp, weight, epilogue.N, rows.K);
  const tt_epilogue into = epilogue.into(out);
  const Workspace workspace(call, call.library.int8_linear_workspace(rows.M, b.M, rows.K));
  check_status(call.library.int8_linear(rows.data, float_dtype(kOp, "x", x), rows.row_stride,
                                        static_cast<const int8_t*>(b.data), b.row_stride, rows.M,
                                        b.M, rows.K, &into, workspace.data, call.stream));
}

// What both overloads check; the device of x is that of all.
struct Call {
  Place place;
  EpilogueArgs epilogue;

  Call(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
       const std::optional<Tensor>& bias, int64_t activation, ScalarType out_dtype,
       const std::optional<Tensor>& out_scale)
      : place(checked_place(x)),
        epilogue(kOp, "weight_scale", weight_scale, bias, activation, place) {
    check_tensor(kOp, "weight", weight, ScalarType::Char, -1, place);
    epilogue.take_out_scale(kOp, out_dtype, out_scale);
  }

  static Place checked_place(const Tensor& x) {
    float_dtype(kOp, "x", x);
    TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
    return place_of(x);
  }

  bool triton() const { return place.is_cuda() && !cuda_serves(kOp, place); }

  void run(const Tensor& x, const Tensor& weight, const Tensor& out) const {
    (place.is_cuda() ? run_cuda : run_cpu)(x, weight, epilogue, out);
  }
};

Tensor triton(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
              const std::optional<Tensor>& bias, int64_t activation,
              std::optional<ScalarType> out_dtype, const std::optional<Tensor>& out_scale) {
  const auto results = call_overload("trimtab::int8_linear", "triton", x, weight, weight_scale,
                                     bias, activation, out_dtype, out_scale);
  return torch::stable::detail::to<Tensor>(results[0]);
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   std::optional<Tensor> bias, int64_t activation,
                   std::optional<ScalarType> out_dtype, std::optional<Tensor> out_scale) {
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  const Call call(x, weight, weight_scale, bias, activation, dtype, out_scale);
  if (call.triton()) return triton(x, weight, weight_scale, bias, activation, dtype, out_scale);
  const Tensor out = empty_rows(x, call.epilogue.N, dtype);
  call.run(x, weight, out);
  return out;
}

void int8_linear_out(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                     std::optional<Tensor> bias, int64_t activation,
                     std::optional<Tensor> out_scale, Tensor out) {
  const ScalarType dtype = out.scalar_type();
  const Call call(x, weight, weight_scale, bias, activation, dtype, out_scale);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = call.epilogue.N;
  check_out(kOp, "out", out, dtype, sizes.data(), int64_t(sizes.size()), call.place);
  if (call.triton()) {
    torch::stable::copy_(out, triton(x, weight, weight_scale, bias, activation, dtype, out_scale));
    return;
  }
  call.run(x, weight, out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None, Tensor? out_scale=None) -> Tensor");
  m.def(
      "int8_linear.inference(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None, Tensor? out_scale=None) -> Tensor");
  m.def(
      "int8_linear.triton(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, ScalarType? out_dtype=None, Tensor? out_scale=None) -> Tensor");
  m.def(
      "int8_linear.out(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0, Tensor? out_scale=None, *, Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.inference", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.out", TORCH_BOX(&int8_linear_out));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.inference", TORCH_BOX(&int8_linear));
  m.impl("int8_linear.out", TORCH_BOX(&int8_linear_out));
}

}  // namespace trimtab
