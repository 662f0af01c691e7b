// The arguments that int8_embedding and int8_embedding_bag share.
#pragma once
#include <trimtab/int8_embedding_bag.h>

#include "adapter.h"

namespace trimtab {

struct EmbeddingArgs {
  Tensor indices, weight, scale;  // contiguous
  int32_t index_size;
  tt_int8_table table;

  EmbeddingArgs(const char* op, const Tensor& index_tensor, const Tensor& weight_tensor,
                const Tensor& weight_scale)
      : indices(index_tensor), weight(weight_tensor), scale(weight_scale) {
    index_size = check_index(op, "indices", indices);
    check_tensor(op, "weight", weight, ScalarType::Char, 2);
    check_tensor(op, "weight_scale", scale, ScalarType::Float, 1);
    TT_CHECK(scale.numel() == weight.sizes()[0], op,
             ": expected weight_scale [V=", weight.sizes()[0], "], got ", describe(scale));
    indices = torch::stable::contiguous(indices);
    weight = torch::stable::contiguous(weight);
    scale = torch::stable::contiguous(scale);
    table = {static_cast<const int8_t*>(weight.const_data_ptr()),
             static_cast<const float*>(scale.const_data_ptr()), weight.sizes()[0],
             weight.sizes()[1]};
  }

  // Bytes of an index; throws unless the tensor is int32 or int64 on the CPU.
  static int32_t check_index(const char* op, const char* name, const Tensor& tensor) {
    const bool is_int = tensor.scalar_type() == ScalarType::Int;
    TT_CHECK(is_int || tensor.scalar_type() == ScalarType::Long, op, ": expected ", name,
             " of int32 or int64, got ", describe(tensor));
    check_place(op, name, tensor, Place::cpu());
    return is_int ? 4 : 8;
  }
};

}  // namespace trimtab
