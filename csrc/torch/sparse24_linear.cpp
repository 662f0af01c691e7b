// out [..., N] = sparse24_linear(x [..., K], values [N, K4 / 2], metadata [ceil(N/16), ceil(K/64), 32], ...)
//
// For CUDA devices: on a CPU a 2:4 weight is a bitmap weight. The overload "inference" is the same function
// without an autograd rule (see int8_linear.cpp).
#include <trimtab/sparse24_linear.h>

#include "cuda.h"
#include "sparse.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "sparse24_linear";

tt_sparse24_weight weight_of(const Tensor& values, const Tensor& metadata, tt_dtype dtype,
                             int64_t K, const Place& place) {
  const int64_t kept = (K + 3) / 4 * 2, size = dtype == TT_I8 ? 1 : 2;
  TT_CHECK(values.dim() == 2 && values.sizes()[1] == kept, kOp, ": expected values [N, ", kept,
           "] for K=", K, ", got ", describe(values));
  const int64_t N = values.sizes()[0], row_bytes = values.stride(0) * size;
  TT_CHECK((values.stride(1) == 1 && row_bytes % 16 == 0) || values.numel() == 0, kOp,
           ": expected rows of values that start on whole 16 bytes, got a stride of ", row_bytes);
  check_tensor(kOp, "metadata", metadata, ScalarType::Int, 3, place);
  const int64_t rows = (N + 15) / 16, blocks = (K + 63) / 64;
  const auto sizes = metadata.sizes();
  TT_CHECK(sizes[0] == rows && sizes[1] == blocks && sizes[2] == 32 && metadata.is_contiguous(),
           kOp, ": expected contiguous metadata [", rows, ", ", blocks, ", 32], got ",
           describe(metadata));
  return {values.const_data_ptr(),
          row_bytes,
          dtype,
          static_cast<const uint32_t*>(metadata.const_data_ptr()),
          N,
          K};
}

Tensor sparse24_linear(const Tensor& x, const Tensor& values, const Tensor& metadata,
                       std::optional<Tensor> weight_scale, std::optional<Tensor> bias,
                       int64_t activation) {
  TT_CHECK(values.dim() == 2, kOp, ": expected values [N, K / 2], got ", describe(values));
  const SparseArgs args(kOp, x, values, weight_scale, bias, activation, values.sizes()[0],
                        place_of(x));
  TT_CHECK(args.values_dtype != TT_F32, kOp,
           ": expected values of bfloat16, float16 or int8, got float32");
  TT_CHECK(
      args.place.is_cuda(), kOp,
      ": expected tensors on a GPU, got them on the CPU, where a 2:4 weight is bitmap_linear's");
  if (!cuda_serves(kOp, args.place)) {
    const auto results = call_overload("trimtab::sparse24_linear", "triton", x, values, metadata,
                                       weight_scale, bias, activation);
    return torch::stable::detail::to<Tensor>(results[0]);
  }
  const CudaCall call(kOp, args.place);
  const Rows rows = cuda_rows(x);
  const tt_sparse24_weight weight =
      weight_of(values, metadata, args.values_dtype, rows.K, args.place);
  const Tensor out = empty_rows(x, args.N, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const Workspace workspace(
      call, call.library.sparse24_linear_workspace(rows.M, rows.K, args.values_dtype));
  check_status(call.library.sparse24_linear(rows.data, args.x_dtype, rows.row_stride, rows.M,
                                            &weight, &into, workspace.data, call.stream));
  return out;
}

}  // namespace

TT_OPS(m) {
  m.def(
      "sparse24_linear(Tensor x, Tensor values, Tensor metadata, Tensor? weight_scale=None, "
      "Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "sparse24_linear.triton(Tensor x, Tensor values, Tensor metadata, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "sparse24_linear.inference(Tensor x, Tensor values, Tensor metadata, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
}

TT_CPU_OPS(m) {  // for the message
  m.impl("sparse24_linear", TORCH_BOX(&sparse24_linear));
  m.impl("sparse24_linear.inference", TORCH_BOX(&sparse24_linear));
}

TT_CUDA_OPS(m) {
  m.impl("sparse24_linear", TORCH_BOX(&sparse24_linear));
  m.impl("sparse24_linear.inference", TORCH_BOX(&sparse24_linear));
}

}  // namespace trimtab
