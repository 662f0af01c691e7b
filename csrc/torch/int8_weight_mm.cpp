// out [..., N] = int8_weight_mm(x [..., K], weight packed or [N, K] int8, weight_scale, zero_point, bias)
//
// weight_scale [N], or [groups, N] with zero_point [groups, N] int8 or none. The overload "inference" is
// the same function without an autograd rule (see int8_linear.cpp). "triton" and "dequantized" are
// implemented in Python: Triton's kernel, and torch's own product with the float weight, made for the call.
#include <trimtab/int8_weight_mm.h>

#include "adapter.h"
#include "cuda.h"
#include "epilogue.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_weight_mm";

struct Call {
  tt_dtype dtype;
  Place place;
  EpilogueArgs epilogue;
  std::optional<Tensor> zero_point;
  int64_t K, group;

  Call(const Tensor& x, const Tensor& weight_scale, const std::optional<Tensor>& zero,
       const std::optional<Tensor>& bias, std::optional<int64_t> group_size, int64_t activation)
      : dtype(float_dtype(kOp, "x", x)),
        place(place_of(x)),
        epilogue(kOp, "weight_scale", weight_scale, bias, activation, place, /*grouped=*/true),
        zero_point(zero) {
    TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
    K = x.sizes()[x.dim() - 1];
    TT_CHECK(!group_size || *group_size >= 1, kOp, ": expected group_size >= 1 or None, got ",
             group_size.value_or(0));
    group = group_size.value_or(std::max<int64_t>(K, 1));
    TT_CHECK(group >= K || group % 4 == 0, kOp,
             ": expected group_size to be a multiple of 4, or K=", K, " or more, got ", group);
    check_groups(weight_scale);
  }

  void check_groups(const Tensor& scale) const {
    const int64_t groups = K > 0 ? (K - 1) / group + 1 : 1;
    const int64_t given = scale.dim() == 2 ? scale.sizes()[0] : 1;
    TT_CHECK(given == groups, kOp, ": expected weight_scale [groups=", groups, ", N] for K=", K,
             " and group_size ", group, ", got ", describe(scale));
    if (!zero_point) return;
    check_tensor(kOp, "zero_point", *zero_point, ScalarType::Char, -1, place);
    bool same = zero_point->dim() == scale.dim() && zero_point->is_contiguous();
    for (int64_t d = 0; same && d < scale.dim(); ++d)
      same = zero_point->sizes()[d] == scale.sizes()[d];
    TT_CHECK(same, kOp, ": expected a contiguous zero_point of the shape of weight_scale ",
             describe(scale), ", got ", describe(*zero_point));
  }

  const int8_t* zeros() const {
    return zero_point ? static_cast<const int8_t*>(zero_point->const_data_ptr()) : nullptr;
  }

  // The overload that answers instead of C++ on this device, or nullptr.
  const char* elsewhere(const Tensor& x) const {
    if (!place.is_cuda()) return nullptr;
    if (!cuda_serves(kOp, place)) return "triton";
    int64_t M = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) M *= x.sizes()[d];
    return M > TT_INT8_WEIGHT_MM_CUDA_MAX_M ? "dequantized" : nullptr;
  }

  void run(const Tensor& x, const Tensor& weight, const Tensor& out) const {
    check_tensor(kOp, "weight", weight, ScalarType::Char, -1, place);
    if (place.is_cuda()) return run_cuda(x, weight, out);
    const Rows rows(x);
    const PackedWeight packed(kOp, weight, epilogue.N, K);
    const tt_epilogue into = epilogue.into(out);
    const tt_parallel pool = torch_pool();
    check_status(tt_int8_weight_mm(rows.data, dtype, rows.row_stride, packed.data, group, zeros(),
                                   rows.M, packed.N, K, &into, &pool));
  }

  void run_cuda(const Tensor& x, const Tensor& weight, const Tensor& out) const {
    const CudaCall call(kOp, place);
    const Rows rows = cuda_rows(x);
    const Rows b = cuda_weight(kOp, weight, epilogue.N, K);
    const tt_epilogue into = epilogue.into(out);
    check_status(call.library.int8_weight_mm(rows.data, dtype, rows.row_stride,
                                             static_cast<const int8_t*>(b.data), b.row_stride,
                                             group, zeros(), rows.M, b.M, K, &into, call.stream));
  }
};

Tensor int8_weight_mm(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                      std::optional<Tensor> zero_point, std::optional<Tensor> bias,
                      std::optional<int64_t> group_size, int64_t activation,
                      std::optional<ScalarType> out_dtype) {
  const Call call(x, weight_scale, zero_point, bias, group_size, activation);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  TT_CHECK(is_float(dtype), kOp, ": expected out of float32, bfloat16 or float16, got ",
           dtype_name(dtype));
  if (const char* overload = call.elsewhere(x)) {
    const auto results = call_overload("trimtab::int8_weight_mm", overload, x, weight, weight_scale,
                                       zero_point, bias, group_size, activation, out_dtype);
    return torch::stable::detail::to<Tensor>(results[0]);
  }
  const Tensor out = empty_rows(x, call.epilogue.N, dtype);
  call.run(x, weight, out);
  return out;
}

void int8_weight_mm_out(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                        std::optional<Tensor> zero_point, std::optional<Tensor> bias,
                        std::optional<int64_t> group_size, int64_t activation, Tensor out) {
  const Call call(x, weight_scale, zero_point, bias, group_size, activation);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = call.epilogue.N;
  const ScalarType dtype = out.scalar_type();
  float_dtype(kOp, "out", out);
  check_out(kOp, "out", out, dtype, sizes.data(), int64_t(sizes.size()), call.place);
  if (call.elsewhere(x) != nullptr) {
    torch::stable::copy_(out, int8_weight_mm(x, weight, weight_scale, zero_point, bias, group_size,
                                             activation, dtype));
    return;
  }
  call.run(x, weight, out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_weight_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor? zero_point=None, "
      "Tensor? bias=None, int? group_size=None, int activation=0, ScalarType? out_dtype=None) "
      "-> Tensor");
  m.def(
      "int8_weight_mm.inference(Tensor x, Tensor weight, Tensor weight_scale, "
      "Tensor? zero_point=None, Tensor? bias=None, int? group_size=None, int activation=0, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_weight_mm.triton(Tensor x, Tensor weight, Tensor weight_scale, "
      "Tensor? zero_point=None, Tensor? bias=None, int? group_size=None, int activation=0, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_weight_mm.dequantized(Tensor x, Tensor weight, Tensor weight_scale, "
      "Tensor? zero_point=None, Tensor? bias=None, int? group_size=None, int activation=0, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_weight_mm.out(Tensor x, Tensor weight, Tensor weight_scale, Tensor? zero_point=None, "
      "Tensor? bias=None, int? group_size=None, int activation=0, *, Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  if (python_answers()) return;
  m.impl("int8_weight_mm", TORCH_BOX(&int8_weight_mm));
  m.impl("int8_weight_mm.inference", TORCH_BOX(&int8_weight_mm));
  m.impl("int8_weight_mm.out", TORCH_BOX(&int8_weight_mm_out));
}

TT_CUDA_OPS(m) {
  if (python_answers()) return;
  m.impl("int8_weight_mm", TORCH_BOX(&int8_weight_mm));
  m.impl("int8_weight_mm.inference", TORCH_BOX(&int8_weight_mm));
  m.impl("int8_weight_mm.out", TORCH_BOX(&int8_weight_mm_out));
}

}  // namespace trimtab
