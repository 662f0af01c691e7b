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
  std::optional<Tensor> out_scale;  // [1], for int8 out
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

  // Takes the scale of an int8 out: throws unless out is int8 with one, or a float without.
  void take_out_scale(const char* op, ScalarType out_dtype, const std::optional<Tensor>& value) {
    const bool int8 = out_dtype == ScalarType::Char;
    TT_CHECK(int8 || is_float(out_dtype), op,
             ": expected out of float32, bfloat16 or float16, or of int8 with out_scale, got ",
             dtype_name(out_dtype));
    TT_CHECK(int8 || !value, op, ": expected out_scale with int8 out alone, got one with ",
             dtype_name(out_dtype));
    TT_CHECK(!int8 || value, op, ": expected out_scale [1] float32 for int8 out, got None");
    out_scale = value;
    if (!int8) return;
    TT_CHECK(value->scalar_type() == ScalarType::Float && value->dim() == 1 && value->numel() == 1,
             op, ": expected out_scale [1] float32, got ", describe(*value));
    check_place(op, "out_scale", *value, place);
  }

  // For an output whose dtype was checked: rows of N adjacent elements.
  tt_epilogue into(const Tensor& out) const {
    return {static_cast<const float*>(scale.const_data_ptr()),
            bias ? bias->const_data_ptr() : nullptr,
            bias_dtype,
            activation,
            out.mutable_data_ptr(),
            N,
            out_scale ? TT_I8 : float_dtype("epilogue", "out", out),
            out_scale ? static_cast<const float*>(out_scale->const_data_ptr()) : nullptr};
  }
};

}  // namespace trimtab
