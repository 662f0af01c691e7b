// out [..., N] = block_linear(x [..., K], values [blocks, bn, bk], crow [R + 1], col [blocks], ...) and the
// two products of its backward
//
// The overload "inference" is the same function without an autograd rule (see int8_linear.cpp). Two are
// implemented in Python for a GPU: "triton" where CUDA C++ cannot answer, and "dense", which that takes where it
// has no kernel (ops/sparse_fallback.py). block_grad_x is implemented there for every GPU.
#include <trimtab/block_linear.h>

#include "cuda.h"
#include "sparse.h"

namespace trimtab {
namespace {

const int32_t* indices(const char* op, const char* name, const Tensor& tensor, int64_t count,
                       const Place& place) {
  check_tensor(op, name, tensor, ScalarType::Int, 1, place);
  TT_CHECK(tensor.numel() == count && tensor.is_contiguous(), op, ": expected a contiguous ", name,
           " [", count, "] int32, got ", describe(tensor));
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// The weight [N, K] as the C interface takes it; values of blocks bn x bk, or NULL.
tt_block_weight block_weight(const char* op, const void* values, tt_dtype dtype, int64_t bn,
                             int64_t bk, const Tensor& crow, const Tensor& col, int64_t N,
                             int64_t K, const Place& place = Place::cpu()) {
  TT_CHECK(bn >= 1 && bk >= 1 && N >= 0 && K >= 0, op,
           ": expected blocks of at least 1 x 1 and N, K >= 0, got ", bn, " x ", bk, " for [", N,
           ", ", K, "]");
  const int64_t blocks = col.numel();
  return {values,
          dtype,
          indices(op, "crow", crow, (N + bn - 1) / bn + 1, place),
          indices(op, "col", col, blocks, place),
          blocks,
          bn,
          bk,
          N,
          K};
}

void check_values(const char* op, const Tensor& values, const Tensor& col) {
  TT_CHECK(values.dim() == 3 && values.is_contiguous(), op,
           ": expected contiguous values [blocks, bn, bk], got ", describe(values));
  TT_CHECK(values.sizes()[0] == col.numel(), op, ": expected col [blocks=", values.sizes()[0],
           "], got ", describe(col));
}

// Values as the CUDA kernels read them: a slice that is not aligned to 16 bytes is copied.
Tensor aligned_values(const Tensor& values) {
  const bool aligned = reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0;
  return aligned ? values : torch::stable::clone(values);
}

Tensor on_cuda(const Tensor& x, const Tensor& values, const SparseArgs& args,
               const tt_block_weight& given) {
  const CudaCall call("block_linear", args.place);
  const Rows rows = args.values_dtype == TT_I8 ? cuda_rows(x) : aligned_cuda_rows(x);
  const Tensor kept = aligned_values(values);
  tt_block_weight weight = given;
  weight.values = kept.const_data_ptr();
  const Tensor out = empty_rows(x, args.N, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const Workspace workspace(call, call.library.block_linear_workspace(&weight, rows.M));
  check_status(call.library.block_linear(rows.data, args.x_dtype, rows.row_stride, &weight, rows.M,
                                         &into, workspace.data, call.stream));
  return out;
}

Tensor block_linear(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col,
                    std::optional<Tensor> weight_scale, std::optional<Tensor> bias,
                    int64_t activation, int64_t N) {
  constexpr const char* kOp = "block_linear";
  const Place place = place_of(x);
  check_values(kOp, values, col);
  const SparseArgs args(kOp, x, values, weight_scale, bias, activation, N, place);
  const tt_block_weight weight =
      block_weight(kOp, values.const_data_ptr(), args.values_dtype, values.sizes()[1],
                   values.sizes()[2], crow, col, N, x.sizes()[x.dim() - 1], place);
  if (place.is_cuda()) {
    if (cuda_serves(kOp, place)) return on_cuda(x, values, args, weight);
    const auto results = call_overload("trimtab::block_linear", "triton", x, values, crow, col,
                                       weight_scale, bias, activation, N);
    return torch::stable::detail::to<Tensor>(results[0]);
  }
  const Rows rows(x);
  const Tensor out = empty_rows(x, N, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const tt_parallel pool = torch_pool();
  check_status(
      tt_block_linear(rows.data, args.x_dtype, rows.row_stride, &weight, rows.M, &into, &pool));
  return out;
}

void check_grad(const char* op, const Tensor& grad, const char* name, const Tensor& other,
                const Place& place = Place::cpu()) {
  TT_CHECK(grad.dim() >= 1, op, ": expected grad of at least one dimension, got ", describe(grad));
  TT_CHECK(grad.scalar_type() == other.scalar_type(), op, ": expected grad and ", name,
           " of one dtype, got ", describe(grad), " and ", describe(other));
  check_place(op, "grad", grad, place);
  check_place(op, name, other, place);
}

Tensor block_grad_x(const Tensor& grad, const Tensor& values, const Tensor& crow, const Tensor& col,
                    int64_t K) {
  constexpr const char* kOp = "block_grad_x";
  check_grad(kOp, grad, "values", values);
  check_values(kOp, values, col);
  const Rows rows(grad);
  const tt_block_weight weight =
      block_weight(kOp, values.const_data_ptr(), float_dtype(kOp, "values", values),
                   values.sizes()[1], values.sizes()[2], crow, col, rows.K, K);
  const Tensor out = empty_rows(grad, K, grad.scalar_type());
  const tt_parallel pool = torch_pool();
  check_status(
      tt_block_grad_x(rows.data, rows.row_stride, &weight, rows.M, out.mutable_data_ptr(), &pool));
  return out;
}

Tensor grad_values_on_cuda(const Tensor& grad, const Tensor& x, const tt_block_weight& weight,
                           const Place& place) {
  const CudaCall call("block_grad_values", place);
  const Rows rows = aligned_cuda_rows(grad), x_rows = aligned_cuda_rows(x);
  const int64_t sizes[] = {weight.blocks, weight.bn, weight.bk};
  const Tensor out = empty(place, sizes, 3, grad.scalar_type());
  const Workspace workspace(call, call.library.block_grad_values_workspace(&weight, rows.M));
  check_status(call.library.block_grad_values(rows.data, rows.row_stride, x_rows.data,
                                              x_rows.row_stride, &weight, rows.M,
                                              out.mutable_data_ptr(), workspace.data, call.stream));
  return out;
}

Tensor block_grad_values(const Tensor& grad, const Tensor& x, const Tensor& crow, const Tensor& col,
                         int64_t bn, int64_t bk) {
  constexpr const char* kOp = "block_grad_values";
  const Place place = place_of(grad);
  check_grad(kOp, grad, "x", x, place);
  TT_CHECK(x.dim() >= 1, kOp, ": expected x of at least one dimension, got ", describe(x));
  const int64_t N = grad.sizes()[grad.dim() - 1], K = x.sizes()[x.dim() - 1];
  const auto rows_of = [](const Tensor& t) {
    int64_t M = 1;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) M *= t.sizes()[size_t(i)];
    return M;
  };
  TT_CHECK(rows_of(grad) == rows_of(x), kOp, ": expected grad and x of as many rows, got ",
           describe(grad), " and ", describe(x));
  const tt_block_weight weight =
      block_weight(kOp, nullptr, float_dtype(kOp, "grad", grad), bn, bk, crow, col, N, K, place);
  if (place.is_cuda()) {
    if (cuda_serves(kOp, place)) return grad_values_on_cuda(grad, x, weight, place);
    const auto results =
        call_overload("trimtab::block_grad_values", "triton", grad, x, crow, col, bn, bk);
    return torch::stable::detail::to<Tensor>(results[0]);
  }
  const Rows rows(grad), x_rows(x);
  const int64_t sizes[] = {weight.blocks, bn, bk};
  const Tensor out = empty(place, sizes, 3, grad.scalar_type());
  const tt_parallel pool = torch_pool();
  check_status(tt_block_grad_values(rows.data, rows.row_stride, x_rows.data, x_rows.row_stride,
                                    &weight, rows.M, out.mutable_data_ptr(), &pool));
  return out;
}

}  // namespace

TT_OPS(m) {
  m.def(
      "block_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? weight_scale, "
      "Tensor? bias, int activation, int N) -> Tensor");
  m.def(
      "block_linear.inference(Tensor x, Tensor values, Tensor crow, Tensor col, "
      "Tensor? weight_scale, Tensor? bias, int activation, int N) -> Tensor");
  m.def(
      "block_linear.triton(Tensor x, Tensor values, Tensor crow, Tensor col, "
      "Tensor? weight_scale, Tensor? bias, int activation, int N) -> Tensor");
  m.def(
      "block_linear.dense(Tensor x, Tensor values, Tensor crow, Tensor col, "
      "Tensor? weight_scale, Tensor? bias, int activation, int N) -> Tensor");
  m.def("block_grad_x(Tensor grad, Tensor values, Tensor crow, Tensor col, int K) -> Tensor");
  m.def(
      "block_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, int bn, int bk) -> "
      "Tensor");
  m.def(
      "block_grad_values.triton(Tensor grad, Tensor x, Tensor crow, Tensor col, int bn, int bk) -> "
      "Tensor");
  m.def(
      "block_grad_values.dense(Tensor grad, Tensor x, Tensor crow, Tensor col, int bn, int bk) -> "
      "Tensor");
}

TT_CPU_OPS(m) {
  m.impl("block_linear", TORCH_BOX(&block_linear));
  m.impl("block_linear.inference", TORCH_BOX(&block_linear));
  m.impl("block_grad_x", TORCH_BOX(&block_grad_x));
  m.impl("block_grad_values", TORCH_BOX(&block_grad_values));
}

TT_CUDA_OPS(m) {
  m.impl("block_linear", TORCH_BOX(&block_linear));
  m.impl("block_linear.inference", TORCH_BOX(&block_linear));
  m.impl("block_grad_values", TORCH_BOX(&block_grad_values));
}

}  // namespace trimtab
