// out [..., D] = int8_embedding(indices [...], weight [V, D] int8, weight_scale [V])
#include "int8_embedding.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_embedding";

void run(const EmbeddingArgs& args, const Tensor& out) {
  const tt_parallel pool = torch_pool();
  check_status(tt_int8_embedding(&args.table, args.indices.const_data_ptr(), args.index_size,
                                 args.indices.numel(), out.mutable_data_ptr(),
                                 float_dtype(kOp, "out", out), &pool));
}

std::vector<int64_t> out_sizes(const Tensor& indices, const Tensor& weight) {
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(weight.sizes()[1]);
  return sizes;
}

Tensor int8_embedding(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale,
                      std::optional<ScalarType> out_dtype) {
  const EmbeddingArgs args(kOp, indices, weight, weight_scale);
  const std::vector<int64_t> sizes = out_sizes(indices, weight);
  const Tensor out =
      empty_cpu(sizes.data(), int64_t(sizes.size()), out_dtype.value_or(ScalarType::Float));
  run(args, out);
  return out;
}

void int8_embedding_out(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale,
                        Tensor out) {
  const EmbeddingArgs args(kOp, indices, weight, weight_scale);
  const std::vector<int64_t> sizes = out_sizes(indices, weight);
  float_dtype(kOp, "out", out);
  check_out(kOp, "out", out, out.scalar_type(), sizes.data(), int64_t(sizes.size()));
  run(args, out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_embedding(Tensor indices, Tensor weight, Tensor weight_scale, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_embedding.out(Tensor indices, Tensor weight, Tensor weight_scale, *, Tensor(a!) out) "
      "-> ()");
}

TT_CPU_OPS(m) {
  m.impl("int8_embedding", TORCH_BOX(&int8_embedding));
  m.impl("int8_embedding.out", TORCH_BOX(&int8_embedding_out));
}

}  // namespace trimtab
