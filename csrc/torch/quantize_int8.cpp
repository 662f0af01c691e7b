// q [..., K] int8, scale [...] fp32 = quantize_int8(x [..., K])
#include <trimtab/quantize_int8.h>

#include "adapter.h"
#include "cuda.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "quantize_int8";

void run(const Tensor& x, const Tensor& q, const Tensor& scale, const Place& place) {
  const tt_dtype dtype = float_dtype(kOp, "x", x);
  int8_t* const into = static_cast<int8_t*>(q.mutable_data_ptr());
  float* const scales = static_cast<float*>(scale.mutable_data_ptr());
  if (place.is_cuda()) {
    const CudaCall call(kOp, place);
    const Rows rows = cuda_rows(x);
    check_status(call.library.quantize_int8(rows.data, dtype, rows.row_stride, rows.M, rows.K, into,
                                            rows.K, scales, call.stream));
    return;
  }
  const Rows rows(x);
  const tt_parallel pool = torch_pool();
  check_status(tt_quantize_int8(rows.data, dtype, rows.row_stride, rows.M, rows.K, into, rows.K,
                                scales, &pool));
}

void check_x(const Tensor& x) {
  float_dtype(kOp, "x", x);
  TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
}

std::tuple<Tensor, Tensor> triton(const Tensor& x) {
  const auto results = call_overload("trimtab::quantize_int8", "triton", x);
  return {torch::stable::detail::to<Tensor>(results[0]),
          torch::stable::detail::to<Tensor>(results[1])};
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x) {
  check_x(x);
  const Place place = place_of(x);
  if (place.is_cuda() && !cuda_serves(kOp, place)) return triton(x);
  const Tensor q = empty_rows(x, x.sizes()[x.dim() - 1], ScalarType::Char);
  const Tensor scale = empty(place, x.sizes().data(), x.dim() - 1, ScalarType::Float);
  run(x, q, scale, place);
  return {q, scale};
}

void quantize_int8_out(const Tensor& x, Tensor q, Tensor scale) {
  check_x(x);
  const Place place = place_of(x);
  check_out(kOp, "q", q, ScalarType::Char, x.sizes().data(), x.dim(), place);
  check_out(kOp, "scale", scale, ScalarType::Float, x.sizes().data(), x.dim() - 1, place);
  if (place.is_cuda() && !cuda_serves(kOp, place)) {
    const auto [codes, scales] = triton(x);
    torch::stable::copy_(q, codes);
    torch::stable::copy_(scale, scales);
    return;
  }
  run(x, q, scale, place);
}

}  // namespace

TT_OPS(m) {
  m.def("quantize_int8(Tensor x) -> (Tensor, Tensor)");
  m.def("quantize_int8.triton(Tensor x) -> (Tensor, Tensor)");
  m.def("quantize_int8.out(Tensor x, *, Tensor(a!) q, Tensor(b!) scale) -> ()");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("quantize_int8.out", TORCH_BOX(&quantize_int8_out));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("quantize_int8.out", TORCH_BOX(&quantize_int8_out));
}

}  // namespace trimtab
