// The epilogue over a tile of sums, one function an (activation, dtype) pair. Internal linkage:
// included once an instruction set.
#pragma once
#include "cpu/int8_kernels.h"
#include "math/epilogue.h"

namespace trimtab {
namespace {

// Columns outside, so that their scale and bias stay in registers.
template <class V, Activation kActivation, class Out>
void epilogue_tile(const int32_t* acc, int acc_stride, int rows, int cols, const float* a_scale,
                   const float* b_scale, const float* bias, void* out, int64_t out_stride) {
  int n = 0;
  for (; n + V::lanes <= cols; n += V::lanes) {
    const V scale = V::load(b_scale + n), offset = V::load(bias + n);
    Out* to = static_cast<Out*>(out) + n;
    for (int m = 0; m < rows; ++m, to += out_stride) {
      epilogue<kActivation>(V::load(acc + m * acc_stride + n), V(a_scale[m]), scale, offset)
          .store(to);
    }
  }
  if (n == cols) return;
  const int rest = cols - n;
  const V scale = V::load_n(b_scale + n, rest), offset = V::load_n(bias + n, rest);
  Out* to = static_cast<Out*>(out) + n;
  for (int m = 0; m < rows; ++m, to += out_stride) {
    epilogue<kActivation>(V::load_n(acc + m * acc_stride + n, rest), V(a_scale[m]), scale, offset)
        .store_n(to, rest);
  }
}

template <class V, Activation kActivation>
EpilogueFn choose_epilogue_dtype(tt_dtype out_dtype) {
  switch (out_dtype) {
    case TT_BF16: return epilogue_tile<V, kActivation, bf16>;
    case TT_F16: return epilogue_tile<V, kActivation, fp16>;
    default: return epilogue_tile<V, kActivation, float>;
  }
}

template <class V>
EpilogueFn choose_epilogue(tt_activation activation, tt_dtype out_dtype) {
  switch (activation) {
    case TT_ACT_RELU: return choose_epilogue_dtype<V, Activation::relu>(out_dtype);
    case TT_ACT_GELU: return choose_epilogue_dtype<V, Activation::gelu>(out_dtype);
    case TT_ACT_GELU_TANH: return choose_epilogue_dtype<V, Activation::gelu_tanh>(out_dtype);
    case TT_ACT_SILU: return choose_epilogue_dtype<V, Activation::silu>(out_dtype);
    default: return choose_epilogue_dtype<V, Activation::none>(out_dtype);
  }
}

}  // namespace
}  // namespace trimtab
