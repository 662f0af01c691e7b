// The arguments that int8_mm, int8_linear, int8_weight_mm and int8_conv2d share after the product.
#pragma once
#include <trimtab/int8_mm.h>

#include "adapter.h"

namespace trimtab {

struct EpilogueArgs {
  Tensor scale;               // [N], or [groups, N] where the op allows it
  std::optional<Tensor> bias; // [N]
  tt_dtype bias_dtype = TT_F32;
  tt_activation activation;
  int64_t N;
  Place place;

  // All of them on the device of x.
  EpilogueArgs(const char* op, const char* scale_name, const Tensor& weight_scale,
               const std::optional<Tensor>& bias_or_none, int64_t activation_code,
               const Place& where, bool grouped = false)
      : scale(weight_scale),
        bias(bias_or_none),
        activation(tt_activation(activation_code)),
        place(where) {
    const int64_t rank = scale.dim();
    check_tensor(op, scale_name, scale, ScalarType::Float, grouped && rank == 2 ? 2 : 1, place);
    TT_CHECK(scale.is_contiguous(), op, ": expected a contiguous ", scale_name);
    N = scale.sizes()[rank - 1];
    if (bias) {
      bias_dtype = float_dtype(op, "bias", *bias);
      TT_CHECK(bias->dim() == 1 && bias->numel() == N && bias->is_contiguous(), op,
               ": expected a contiguous bias [N=", N, "], got ", describe(*bias));
      check_place(op, "bias", *bias, place);
    }
    TT_CHECK(activation_code >= TT_ACT_NONE && activation_code <= TT_ACT_SILU, op,
             ": expected activation 0 (none), 1 (relu), 2 (gelu), 3 (gelu_tanh) or 4 (silu), "
             "got ",
             activation_code);
  }

  // For an output whose dtype was checked: rows of N adjacent elements.
  tt_epilogue into(const Tensor& out) const {
    return {static_cast<const float*>(scale.const_data_ptr()),
            bias ? bias->const_data_ptr() : nullptr,
            bias_dtype,
            activation,
            out.mutable_data_ptr(),
            N,
            float_dtype("epilogue", "out", out)};
  }
};

}  // namespace trimtab
