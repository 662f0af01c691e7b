// out [bags, D] = int8_embedding_bag(indices [n] with offsets, or [bags, n]; weight [V, D] int8, ...)
#include "int8_embedding.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_embedding_bag";

struct BagArgs {
  EmbeddingArgs table;
  std::optional<Tensor> offsets, weights;  // contiguous
  tt_bags bags{};

  BagArgs(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale,
          const std::optional<Tensor>& offsets_or_none, int64_t mode,
          const std::optional<Tensor>& weights_or_none, int64_t padding_index,
          bool include_last_offset)
      : table(kOp, indices, weight, weight_scale) {
    TT_CHECK(indices.dim() == (offsets_or_none ? 1 : 2), kOp,
             ": expected indices [n] with offsets or [bags, n] without, got ", describe(indices),
             offsets_or_none ? " with offsets" : " without");
    TT_CHECK(padding_index >= -1 && padding_index < table.table.rows, kOp,
             ": expected padding_idx in [-1, ", table.table.rows, "), got ", padding_index);
    bags.indices = table.indices.const_data_ptr();
    bags.index_size = table.index_size;
    bags.count = table.indices.numel();
    bags.padding_index = padding_index;
    bags.mode = tt_bag_mode(mode);
    bags.bags = indices.sizes()[0];
    if (offsets_or_none) take_offsets(*offsets_or_none, include_last_offset);
    if (weights_or_none) take_weights(*weights_or_none, indices);
  }

  void take_offsets(const Tensor& tensor, bool include_last_offset) {
    TT_CHECK(tensor.dim() == 1 && tensor.scalar_type() == table.indices.scalar_type(), kOp,
             ": expected 1-D offsets of the indices' dtype, got ", describe(tensor));
    EmbeddingArgs::check_index(kOp, "offsets", tensor);
    TT_CHECK(!include_last_offset || tensor.numel() > 0, kOp,
             ": expected at least one offset with include_last_offset");
    offsets = torch::stable::contiguous(tensor);
    bags.offset_count = offsets->numel();
    bags.bags = bags.offset_count - (include_last_offset ? 1 : 0);
    // An empty tensor has no address, but there are offsets: none.
    static const int64_t none = 0;
    bags.offsets = bags.offset_count > 0 ? offsets->const_data_ptr() : &none;
    TT_CHECK(bags.bags > 0 || bags.count == 0, kOp, ": expected no indices for no bags, got ",
             bags.count);
  }

  void take_weights(const Tensor& tensor, const Tensor& indices) {
    check_tensor(kOp, "per_sample_weights", tensor, ScalarType::Float, indices.dim());
    TT_CHECK(tensor.numel() == indices.numel() && tensor.sizes()[0] == indices.sizes()[0], kOp,
             ": expected per_sample_weights of the indices' sizes, ", describe(indices), ", got ",
             describe(tensor));
    weights = torch::stable::contiguous(tensor);
    static const float none = 0;
    bags.per_sample_weight =
        bags.count > 0 ? static_cast<const float*>(weights->const_data_ptr()) : &none;
  }

  void run(const Tensor& out) const {
    const tt_parallel pool = torch_pool();
    check_status(tt_int8_embedding_bag(&table.table, &bags, out.mutable_data_ptr(),
                                       float_dtype(kOp, "out", out), &pool));
  }
};

Tensor int8_embedding_bag(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale,
                          std::optional<Tensor> offsets, int64_t mode,
                          std::optional<Tensor> per_sample_weights, int64_t padding_idx,
                          bool include_last_offset, std::optional<ScalarType> out_dtype) {
  const BagArgs args(indices, weight, weight_scale, offsets, mode, per_sample_weights, padding_idx,
                     include_last_offset);
  const int64_t sizes[] = {args.bags.bags, args.table.table.columns};
  const Tensor out = empty_cpu(sizes, 2, out_dtype.value_or(ScalarType::Float));
  args.run(out);
  return out;
}

void int8_embedding_bag_out(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale,
                            std::optional<Tensor> offsets, int64_t mode,
                            std::optional<Tensor> per_sample_weights, int64_t padding_idx,
                            bool include_last_offset, Tensor out) {
  const BagArgs args(indices, weight, weight_scale, offsets, mode, per_sample_weights, padding_idx,
                     include_last_offset);
  const int64_t sizes[] = {args.bags.bags, args.table.table.columns};
  float_dtype(kOp, "out", out);
  check_out(kOp, "out", out, out.scalar_type(), sizes, 2);
  args.run(out);
}

}  // namespace

TT_OPS(m) {
  m.def(
      "int8_embedding_bag(Tensor indices, Tensor weight, Tensor weight_scale, Tensor? "
      "offsets=None, "
      "int bag_mode=0, Tensor? per_sample_weights=None, int padding_idx=-1, "
      "bool include_last_offset=False, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "int8_embedding_bag.out(Tensor indices, Tensor weight, Tensor weight_scale, "
      "Tensor? offsets=None, int bag_mode=0, Tensor? per_sample_weights=None, int padding_idx=-1, "
      "bool include_last_offset=False, *, Tensor(a!) out) -> ()");
}

TT_CPU_OPS(m) {
  m.impl("int8_embedding_bag", TORCH_BOX(&int8_embedding_bag));
  m.impl("int8_embedding_bag.out", TORCH_BOX(&int8_embedding_bag_out));
}

}  // namespace trimtab
