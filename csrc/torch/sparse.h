// The arguments that the sparse products share: x, values, weight_scale, bias, activation.
#pragma once
#include <trimtab/int8_mm.h>

#include "adapter.h"

namespace trimtab {

struct SparseArgs {
  tt_dtype x_dtype, values_dtype;
  std::optional<Tensor> weight_scale, bias;
  tt_dtype bias_dtype = TT_F32;
  tt_activation activation;
  int64_t N;
  Place place;

  // All on that device. Float values have x's dtype; int8 values come with weight_scale [N].
  SparseArgs(const char* op, const Tensor& x, const Tensor& values,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& bias_or_none,
             int64_t activation_code, int64_t outputs, const Place& where = Place::cpu())
      : weight_scale(scale),
        bias(bias_or_none),
        activation(tt_activation(activation_code)),
        N(outputs),
        place(where) {
    x_dtype = float_dtype(op, "x", x);
    check_place(op, "x", x, place);
    TT_CHECK(x.dim() >= 1, op, ": expected x of at least one dimension, got ", describe(x));
    const bool int8 = values.scalar_type() == ScalarType::Char;
    TT_CHECK(int8 || values.scalar_type() == x.scalar_type(), op,
             ": expected values of int8 or of the dtype of x, ", dtype_name(x.scalar_type()),
             ", got ", describe(values));
    check_place(op, "values", values, place);
    values_dtype = int8 ? TT_I8 : x_dtype;
    check_scale(op, int8);
    if (bias) {
      bias_dtype = float_dtype(op, "bias", *bias);
      TT_CHECK(bias->dim() == 1 && bias->numel() == N && bias->is_contiguous(), op,
               ": expected a contiguous bias [N=", N, "], got ", describe(*bias));
      check_place(op, "bias", *bias, place);
    }
    TT_CHECK(activation_code >= TT_ACT_NONE && activation_code <= TT_ACT_SILU, op,
             ": expected activation 0 (none), 1 (relu), 2 (gelu), 3 (gelu_tanh) or 4 (silu), got ",
             activation_code);
  }

  // For a contiguous output of x's dtype.
  tt_epilogue into(const Tensor& out) const {
    return {weight_scale ? static_cast<const float*>(weight_scale->const_data_ptr()) : nullptr,
            bias ? bias->const_data_ptr() : nullptr,
            bias_dtype,
            activation,
            out.mutable_data_ptr(),
            N,
            x_dtype,
            nullptr};
  }

 private:
  void check_scale(const char* op, bool int8) const {
    TT_CHECK(int8 || !weight_scale, op, ": expected weight_scale with int8 values alone");
    TT_CHECK(!int8 || weight_scale, op, ": expected weight_scale [N=", N,
             "] float32 for int8 values, got None");
    if (!int8) return;
    check_tensor(op, "weight_scale", *weight_scale, ScalarType::Float, 1, place);
    TT_CHECK(weight_scale->numel() == N && weight_scale->is_contiguous(), op,
             ": expected a contiguous weight_scale [N=", N, "], got ", describe(*weight_scale));
  }
};

}  // namespace trimtab
