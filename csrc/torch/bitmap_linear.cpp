// out [..., N] = bitmap_linear(x [..., K], values [kept], bitmap [N, 8 ceil(K/64)], row_start [N+1], ...)
//
// The overload "inference" is the same function without an autograd rule (see int8_linear.cpp). Two are
// implemented in Python for a GPU: "triton" where CUDA C++ cannot answer, and "dense", through the dense weight,
// where rows are many (ops/sparse_fallback.py).
#include <trimtab/bitmap_linear.h>

#include "bitmap.h"
#include "cuda.h"
#include "sparse.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "bitmap_linear";

Tensor on_cpu(const Tensor& x, const SparseArgs& args, const tt_bitmap& weight, const Rows& rows) {
  const Tensor out = empty_rows(x, args.N, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_bitmap_linear(rows.data, args.x_dtype, rows.row_stride, &weight, rows.M, args.N,
                                rows.K, &into, &pool));
  return out;
}

Tensor on_cuda(const Tensor& x, const SparseArgs& args, const tt_bitmap& weight, const Rows& rows) {
  const CudaCall call(kOp, args.place);
  const Tensor out = empty_rows(x, args.N, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const Workspace workspace(
      call, call.library.bitmap_linear_workspace(rows.M, rows.K, args.values_dtype));
  check_status(call.library.bitmap_linear(rows.data, args.x_dtype, rows.row_stride, &weight, rows.M,
                                          args.N, rows.K, &into, workspace.data, call.stream));
  return out;
}

bool is_aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

Tensor bitmap_linear(const Tensor& x, const Tensor& values, const Tensor& bitmap,
                     const Tensor& row_start, std::optional<Tensor> weight_scale,
                     std::optional<Tensor> bias, int64_t activation) {
  const Place place = place_of(x);
  check_tensor(kOp, "bitmap", bitmap, ScalarType::Byte, 2, place);
  const SparseArgs args(kOp, x, values, weight_scale, bias, activation, bitmap.sizes()[0], place);
  const Rows rows = place.is_cuda() ? cuda_rows(x) : Rows(x);
  const tt_bitmap weight =
      bitmap_of(kOp, values, bitmap, row_start, args.values_dtype, rows.K, place);
  if (!place.is_cuda()) return on_cpu(x, args, weight, rows);
  const bool few = rows.M <= TT_BITMAP_LINEAR_CUDA_MAX_M, by_cuda = cuda_serves(kOp, place);
  if (few && by_cuda && is_aligned(weight.values, 16) && is_aligned(weight.bits, 8))
    return on_cuda(x, args, weight, rows);
  const char* overload = few && !by_cuda ? "triton" : "dense";
  const auto results = call_overload("trimtab::bitmap_linear", overload, x, values, bitmap,
                                     row_start, weight_scale, bias, activation);
  return torch::stable::detail::to<Tensor>(results[0]);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "bitmap_linear(Tensor x, Tensor values, Tensor bitmap, Tensor row_start, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "bitmap_linear.inference(Tensor x, Tensor values, Tensor bitmap, Tensor row_start, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "bitmap_linear.triton(Tensor x, Tensor values, Tensor bitmap, Tensor row_start, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "bitmap_linear.dense(Tensor x, Tensor values, Tensor bitmap, Tensor row_start, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
}

TT_CPU_OPS(m) {
  m.impl("bitmap_linear", TORCH_BOX(&bitmap_linear));
  m.impl("bitmap_linear.inference", TORCH_BOX(&bitmap_linear));
}

TT_CUDA_OPS(m) {
  m.impl("bitmap_linear", TORCH_BOX(&bitmap_linear));
  m.impl("bitmap_linear.inference", TORCH_BOX(&bitmap_linear));
}

}  // namespace trimtab
