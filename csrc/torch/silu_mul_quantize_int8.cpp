// q [..., K] int8, scale [...] fp32 = quantize_int8(silu(gate [..., K]) * up [..., K])
#include <trimtab/silu_mul_quantize_int8.h>

#include "adapter.h"
#include "cuda.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "silu_mul_quantize_int8";

void check(const Tensor& gate, const Tensor& up) {
  float_dtype(kOp, "gate", gate);
  TT_CHECK(gate.dim() >= 1, kOp, ": expected gate of at least one dimension, got ", describe(gate));
  bool same = up.dim() == gate.dim() && up.scalar_type() == gate.scalar_type();
  for (int64_t i = 0; same && i < gate.dim(); ++i) same = up.sizes()[i] == gate.sizes()[i];
  TT_CHECK(same, kOp, ": expected up like gate, ", describe(gate), ", got ", describe(up));
  check_place(kOp, "up", up, place_of(gate));
}

void run(const Tensor& gate, const Tensor& up, const Tensor& q, const Tensor& scale,
         const Place& place) {
  const tt_dtype dtype = float_dtype(kOp, "gate", gate);
  int8_t* const into = static_cast<int8_t*>(q.mutable_data_ptr());
  float* const scales = static_cast<float*>(scale.mutable_data_ptr());
  if (place.is_cuda()) {
    const CudaCall call(kOp, place);
    const Rows g = cuda_rows(gate), u = cuda_rows(up);
    check_status(call.library.silu_mul_quantize_int8(g.data, g.row_stride, u.data, u.row_stride,
                                                     dtype, g.M, g.K, into, g.K, scales,
                                                     call.stream));
    return;
  }
  const Rows g(gate), u(up);
  const tt_parallel pool = torch_pool();
  check_status(tt_silu_mul_quantize_int8(g.data, g.row_stride, u.data, u.row_stride, dtype, g.M,
                                         g.K, into, g.K, scales, &pool));
}

std::tuple<Tensor, Tensor> triton(const Tensor& gate, const Tensor& up) {
  const auto results = call_overload("trimtab::silu_mul_quantize_int8", "triton", gate, up);
  return {torch::stable::detail::to<Tensor>(results[0]),
          torch::stable::detail::to<Tensor>(results[1])};
}

std::tuple<Tensor, Tensor> silu_mul_quantize_int8(const Tensor& gate, const Tensor& up) {
  check(gate, up);
  const Place place = place_of(gate);
  if (place.is_cuda() && !cuda_serves(kOp, place)) return triton(gate, up);
  const Tensor q = empty_rows(gate, gate.sizes()[gate.dim() - 1], ScalarType::Char);
  const Tensor scale = empty(place, gate.sizes().data(), gate.dim() - 1, ScalarType::Float);
  run(gate, up, q, scale, place);
  return {q, scale};
}

void silu_mul_quantize_int8_out(const Tensor& gate, const Tensor& up, Tensor q, Tensor scale) {
  check(gate, up);
  const Place place = place_of(gate);
  check_out(kOp, "q", q, ScalarType::Char, gate.sizes().data(), gate.dim(), place);
  check_out(kOp, "scale", scale, ScalarType::Float, gate.sizes().data(), gate.dim() - 1, place);
  if (place.is_cuda() && !cuda_serves(kOp, place)) {
    const auto [codes, scales] = triton(gate, up);
    torch::stable::copy_(q, codes);
    torch::stable::copy_(scale, scales);
    return;
  }
  run(gate, up, q, scale, place);
}

}  // namespace

TT_OPS(m) {
  m.def("silu_mul_quantize_int8(Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("silu_mul_quantize_int8.triton(Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def(
      "silu_mul_quantize_int8.out(Tensor gate, Tensor up, *, Tensor(a!) q, Tensor(b!) scale) -> "
      "()");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("silu_mul_quantize_int8", TORCH_BOX(&silu_mul_quantize_int8));
  m.impl("silu_mul_quantize_int8.out", TORCH_BOX(&silu_mul_quantize_int8_out));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("silu_mul_quantize_int8", TORCH_BOX(&silu_mul_quantize_int8));
  m.impl("silu_mul_quantize_int8.out", TORCH_BOX(&silu_mul_quantize_int8_out));
}

}  // namespace trimtab
