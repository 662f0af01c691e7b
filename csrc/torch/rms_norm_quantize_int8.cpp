// q [..., K] int8, scale [...] fp32 = quantize_int8(rms_norm(x [..., K]) * weight [K])
#include <trimtab/rms_norm_quantize_int8.h>

#include "adapter.h"
#include "cuda.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "rms_norm_quantize_int8";

void check(const Tensor& x, const Tensor& weight) {
  float_dtype(kOp, "x", x);
  TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
  const bool fits =
      weight.dim() == 1 && weight.sizes()[0] == x.sizes()[x.dim() - 1] &&
      (weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float);
  TT_CHECK(fits, kOp, ": expected weight [K] of float32 or x's dtype for x ", describe(x), ", got ",
           describe(weight));
  check_place(kOp, "weight", weight, place_of(x));
}

void run(const Tensor& x, const Tensor& weight, double eps, const Tensor& q, const Tensor& scale,
         const Place& place) {
  const tt_dtype dtype = float_dtype(kOp, "x", x),
                 weight_dtype = float_dtype(kOp, "weight", weight);
  int8_t* const into = static_cast<int8_t*>(q.mutable_data_ptr());
  float* const scales = static_cast<float*>(scale.mutable_data_ptr());
  const Rows factors(weight);
  if (place.is_cuda()) {
    const CudaCall call(kOp, place);
    const Rows rows = cuda_rows(x);
    check_status(call.library.rms_norm_quantize_int8(rows.data, dtype, rows.row_stride,
                                                     factors.data, weight_dtype, float(eps), rows.M,
                                                     rows.K, into, rows.K, scales, call.stream));
    return;
  }
  const Rows rows(x);
  const tt_parallel pool = torch_pool();
  check_status(tt_rms_norm_quantize_int8(rows.data, dtype, rows.row_stride, factors.data,
                                         weight_dtype, float(eps), rows.M, rows.K, into, rows.K,
                                         scales, &pool));
}

std::tuple<Tensor, Tensor> triton(const Tensor& x, const Tensor& weight, double eps) {
  const auto results = call_overload("trimtab::rms_norm_quantize_int8", "triton", x, weight, eps);
  return {torch::stable::detail::to<Tensor>(results[0]),
          torch::stable::detail::to<Tensor>(results[1])};
}

std::tuple<Tensor, Tensor> rms_norm_quantize_int8(const Tensor& x, const Tensor& weight,
                                                  double eps) {
  check(x, weight);
  const Place place = place_of(x);
  if (place.is_cuda() && !cuda_serves(kOp, place)) return triton(x, weight, eps);
  const Tensor q = empty_rows(x, x.sizes()[x.dim() - 1], ScalarType::Char);
  const Tensor scale = empty(place, x.sizes().data(), x.dim() - 1, ScalarType::Float);
  run(x, weight, eps, q, scale, place);
  return {q, scale};
}

void rms_norm_quantize_int8_out(const Tensor& x, const Tensor& weight, double eps, Tensor q,
                                Tensor scale) {
  check(x, weight);
  const Place place = place_of(x);
  check_out(kOp, "q", q, ScalarType::Char, x.sizes().data(), x.dim(), place);
  check_out(kOp, "scale", scale, ScalarType::Float, x.sizes().data(), x.dim() - 1, place);
  if (place.is_cuda() && !cuda_serves(kOp, place)) {
    const auto [codes, scales] = triton(x, weight, eps);
    torch::stable::copy_(q, codes);
    torch::stable::copy_(scale, scales);
    return;
  }
  run(x, weight, eps, q, scale, place);
}

}  // namespace

TT_OPS(m) {
  m.def("rms_norm_quantize_int8(Tensor x, Tensor weight, float eps=1e-6) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_quantize_int8.triton(Tensor x, Tensor weight, float eps=1e-6) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_quantize_int8.out(Tensor x, Tensor weight, float eps=1e-6, *, Tensor(a!) q, "
      "Tensor(b!) scale) -> ()");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("rms_norm_quantize_int8", TORCH_BOX(&rms_norm_quantize_int8));
  m.impl("rms_norm_quantize_int8.out", TORCH_BOX(&rms_norm_quantize_int8_out));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("rms_norm_quantize_int8", TORCH_BOX(&rms_norm_quantize_int8));
  m.impl("rms_norm_quantize_int8.out", TORCH_BOX(&rms_norm_quantize_int8_out));
}

}  // namespace trimtab
