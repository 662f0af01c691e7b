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

std::tuple<Tensor, Tensor> silu_mul_quantize_int8(const Tensor& gate, const Tensor& up) {
  check(gate, up);
  const Place place = place_of(gate);
  if (place.is_cuda() && !cuda_serves(kOp, place)) {
    const auto results = call_overload("trimtab::silu_mul_quantize_int8", "triton", gate, up);
    return {torch::stable::detail::to<Tensor>(results[0]),
            torch::stable::detail::to<Tensor>(results[1])};
  }
  const tt_dtype dtype = float_dtype(kOp, "gate", gate);
  const Tensor q = empty_rows(gate, gate.sizes()[gate.dim() - 1], ScalarType::Char);
  const Tensor scale = empty(place, gate.sizes().data(), gate.dim() - 1, ScalarType::Float);
  int8_t* const into = static_cast<int8_t*>(q.mutable_data_ptr());
  float* const scales = static_cast<float*>(scale.mutable_data_ptr());
  if (place.is_cuda()) {
    const CudaCall call(kOp, place);
    const Rows g = cuda_rows(gate), u = cuda_rows(up);
    check_status(call.library.silu_mul_quantize_int8(g.data, g.row_stride, u.data, u.row_stride,
                                                     dtype, g.M, g.K, into, g.K, scales,
                                                     call.stream));
    return {q, scale};
  }
  const Rows g(gate), u(up);
  const tt_parallel pool = torch_pool();
  check_status(tt_silu_mul_quantize_int8(g.data, g.row_stride, u.data, u.row_stride, dtype, g.M,
                                         g.K, into, g.K, scales, &pool));
  return {q, scale};
}

}  // namespace

TT_OPS(m) {
  m.def("silu_mul_quantize_int8(Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("silu_mul_quantize_int8.triton(Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("silu_mul_quantize_int8", TORCH_BOX(&silu_mul_quantize_int8));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("silu_mul_quantize_int8", TORCH_BOX(&silu_mul_quantize_int8));
}

}  // namespace trimtab
