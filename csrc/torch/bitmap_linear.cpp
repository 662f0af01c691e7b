// out [..., N] = bitmap_linear(x [..., K], values [kept], bitmap [N, 8 ceil(K/64)], row_start [N+1], ...)
//
// The overload "inference" is the same function without an autograd rule (see int8_linear.cpp).
#include <trimtab/bitmap_linear.h>

#include "sparse.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "bitmap_linear";

// The weight as the C interface takes it.
tt_bitmap bitmap_of(const Tensor& values, const Tensor& bitmap, const Tensor& row_start,
                    tt_dtype dtype, int64_t K) {
  check_tensor(kOp, "bitmap", bitmap, ScalarType::Byte, 2);
  const int64_t N = bitmap.sizes()[0];
  TT_CHECK(bitmap.sizes()[1] == tt_bitmap_row_bytes(K) && bitmap.is_contiguous(), kOp,
           ": expected a contiguous bitmap [N, ", tt_bitmap_row_bytes(K), "] for K=", K, ", got ",
           describe(bitmap));
  check_tensor(kOp, "row_start", row_start, ScalarType::Long, 1);
  TT_CHECK(row_start.numel() == N + 1 && row_start.is_contiguous(), kOp,
           ": expected a contiguous row_start [N + 1=", N + 1, "], got ", describe(row_start));
  TT_CHECK(values.dim() == 1 && values.is_contiguous(), kOp,
           ": expected contiguous values [kept], got ", describe(values));
  return {values.const_data_ptr(), dtype, static_cast<const uint8_t*>(bitmap.const_data_ptr()),
          static_cast<const int64_t*>(row_start.const_data_ptr()), values.numel()};
}

Tensor bitmap_linear(const Tensor& x, const Tensor& values, const Tensor& bitmap,
                     const Tensor& row_start, std::optional<Tensor> weight_scale,
                     std::optional<Tensor> bias, int64_t activation) {
  check_tensor(kOp, "bitmap", bitmap, ScalarType::Byte, 2);
  const SparseArgs args(kOp, x, values, weight_scale, bias, activation, bitmap.sizes()[0]);
  const Rows rows(x);
  const tt_bitmap weight = bitmap_of(values, bitmap, row_start, args.values_dtype, rows.K);
  const Tensor out = empty_rows(x, args.N, x.scalar_type());
  const tt_epilogue into = args.into(out);
  const tt_parallel pool = torch_pool();
  check_status(tt_bitmap_linear(rows.data, args.x_dtype, rows.row_stride, &weight, rows.M, args.N,
                                rows.K, &into, &pool));
  return out;
}

}  // namespace

TT_OPS(m) {
  m.def(
      "bitmap_linear(Tensor x, Tensor values, Tensor bitmap, Tensor row_start, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "bitmap_linear.inference(Tensor x, Tensor values, Tensor bitmap, Tensor row_start, "
      "Tensor? weight_scale=None, Tensor? bias=None, int activation=0) -> Tensor");
}

TT_CPU_OPS(m) {
  m.impl("bitmap_linear", TORCH_BOX(&bitmap_linear));
  m.impl("bitmap_linear.inference", TORCH_BOX(&bitmap_linear));
}

}  // namespace trimtab
