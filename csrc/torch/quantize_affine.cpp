// q [..., K] uint8, scale and zero_point [..., groups] = quantize_affine(x [..., K], bits, group_size)
// out [..., K] = dequantize_affine(q, scale, zero_point, group_size)
//
// group_size None: the whole row is one group.
#include <trimtab/quantize_affine.h>

#include "adapter.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "quantize_affine";
constexpr const char* kBack = "dequantize_affine";

struct Groups {
  int64_t K, size, count;
  std::vector<int64_t> shape;  // of scale and zero_point

  Groups(const char* op, const char* name, const Tensor& x, std::optional<int64_t> group_size) {
    TT_CHECK(x.dim() >= 1, op, ": expected ", name, " of at least one dimension, got ",
             describe(x));
    TT_CHECK(!group_size || *group_size >= 1, op, ": expected group_size >= 1 or None, got ",
             group_size.value_or(0));
    K = x.sizes()[x.dim() - 1];
    size = group_size.value_or(std::max<int64_t>(K, 1));
    count = tt_affine_groups(K, size);
    shape.assign(x.sizes().begin(), x.sizes().end());
    shape.back() = count;
  }
};

tt_affine codes_of(int64_t bits, const Groups& groups, const void* q, int64_t q_stride,
                   const Tensor& scale, const Tensor& zero_point) {
  return {int32_t(bits),
          groups.size,
          static_cast<uint8_t*>(const_cast<void*>(q)),
          q_stride,
          static_cast<float*>(const_cast<void*>(scale.const_data_ptr())),
          static_cast<uint8_t*>(const_cast<void*>(zero_point.const_data_ptr()))};
}

void check_input(const Tensor& x, int64_t bits) {
  float_dtype(kOp, "x", x);
  TT_CHECK(bits >= 2 && bits <= 8, kOp, ": expected bits in 2..8, got ", bits);
}

void run(const Tensor& x, int64_t bits, const Groups& groups, const Tensor& q, const Tensor& scale,
         const Tensor& zero_point) {
  const Rows rows(x);
  const tt_affine to = codes_of(bits, groups, q.mutable_data_ptr(), rows.K, scale, zero_point);
  const tt_parallel pool = torch_pool();
  check_status(tt_quantize_affine(rows.data, float_dtype(kOp, "x", x), rows.row_stride, rows.M,
                                  rows.K, &to, &pool));
}

std::tuple<Tensor, Tensor, Tensor> quantize_affine(const Tensor& x, int64_t bits,
                                                   std::optional<int64_t> group_size) {
  check_input(x, bits);
  const Groups groups(kOp, "x", x, group_size);
  const Tensor q = empty_rows(x, groups.K, ScalarType::Byte);
  const Tensor scale = empty_rows(x, groups.count, ScalarType::Float);
  const Tensor zero_point = empty_rows(x, groups.count, ScalarType::Byte);
  run(x, bits, groups, q, scale, zero_point);
  return {q, scale, zero_point};
}

void quantize_affine_out(const Tensor& x, int64_t bits, std::optional<int64_t> group_size, Tensor q,
                         Tensor scale, Tensor zero_point) {
  check_input(x, bits);
  const Groups groups(kOp, "x", x, group_size);
  check_out(kOp, "q", q, ScalarType::Byte, x.sizes().data(), x.dim());
  check_out(kOp, "scale", scale, ScalarType::Float, groups.shape.data(), x.dim());
  check_out(kOp, "zero_point", zero_point, ScalarType::Byte, groups.shape.data(), x.dim());
  run(x, bits, groups, q, scale, zero_point);
}

// scale or zero_point: contiguous, one value a group.
void check_groups(const char* name, const Tensor& tensor, ScalarType dtype, const Groups& groups,
                  const Tensor& q) {
  check_tensor(kBack, name, tensor, dtype, -1);
  bool same = tensor.dim() == q.dim() && tensor.is_contiguous();
  for (int64_t d = 0; same && d < q.dim(); ++d) same = tensor.sizes()[d] == groups.shape[size_t(d)];
  TT_CHECK(same, kBack, ": expected contiguous ", name, " with ", groups.count,
           " groups a row for q ", describe(q), " and group_size ", groups.size, ", got ",
           describe(tensor));
}

Groups check_codes(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                   std::optional<int64_t> group_size) {
  check_tensor(kBack, "q", q, ScalarType::Byte, -1);
  Groups groups(kBack, "q", q, group_size);
  check_groups("scale", scale, ScalarType::Float, groups, q);
  check_groups("zero_point", zero_point, ScalarType::Byte, groups, q);
  return groups;
}

void run_back(const Tensor& q, const Tensor& scale, const Tensor& zero_point, const Groups& groups,
              const Tensor& out) {
  const Rows rows(q);
  const tt_affine from = codes_of(8, groups, rows.data, rows.row_stride, scale, zero_point);
  const tt_parallel pool = torch_pool();
  check_status(tt_dequantize_affine(&from, rows.M, rows.K, out.mutable_data_ptr(),
                                    float_dtype(kBack, "out", out), rows.K, &pool));
}

Tensor dequantize_affine(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                         std::optional<int64_t> group_size, std::optional<ScalarType> out_dtype) {
  const Groups groups = check_codes(q, scale, zero_point, group_size);
  const Tensor out = empty_rows(q, groups.K, out_dtype.value_or(ScalarType::Float));
  float_dtype(kBack, "out", out);
  run_back(q, scale, zero_point, groups, out);
  return out;
}

void dequantize_affine_out(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                           std::optional<int64_t> group_size, Tensor out) {
  const Groups groups = check_codes(q, scale, zero_point, group_size);
  float_dtype(kBack, "out", out);
  check_out(kBack, "out", out, out.scalar_type(), q.sizes().data(), q.dim());
  run_back(q, scale, zero_point, groups, out);
}

}  // namespace

TT_OPS(m) {
  m.def("quantize_affine(Tensor x, int bits=8, int? group_size=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "quantize_affine.out(Tensor x, int bits=8, int? group_size=None, *, Tensor(a!) q, "
      "Tensor(b!) scale, Tensor(c!) zero_point) -> ()");
  m.def(
      "dequantize_affine(Tensor q, Tensor scale, Tensor zero_point, int? group_size=None, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "dequantize_affine.out(Tensor q, Tensor scale, Tensor zero_point, int? group_size=None, *, "
      "Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  m.impl("quantize_affine", TORCH_BOX(&quantize_affine));
  m.impl("quantize_affine.out", TORCH_BOX(&quantize_affine_out));
  m.impl("dequantize_affine", TORCH_BOX(&dequantize_affine));
  m.impl("dequantize_affine.out", TORCH_BOX(&dequantize_affine_out));
}

}  // namespace trimtab
