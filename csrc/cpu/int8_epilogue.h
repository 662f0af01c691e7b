// The epilogue over a tile of sums, one function an (activation, dtype) pair. Internal linkage:
// included once an instruction set.
#pragma once
#include "cpu/int8_kernels.h"
#include "math/epilogue.h"

namespace trimtab {
namespace {

template <class V, class Out>
TT_INLINE void store_output(V t, V, Out* to) {
  t.store(to);
}
template <class V>
TT_INLINE void store_output(V t, V inverse, int8_t* to) {
  store_int8(to, int8_code(t, inverse));
}
template <class V, class Out>
TT_INLINE void store_output_n(V t, V, Out* to, int n) {
  t.store_n(to, n);
}
template <class V>
TT_INLINE void store_output_n(V t, V inverse, int8_t* to, int n) {
  store_int8_n(to, int8_code(t, inverse), n);
}

// Columns outside, so that their scale and bias stay in registers.
template <class V, Activation kActivation, class Out>
void epilogue_tile(const int32_t* acc, int acc_stride, int rows, int cols, const float* a_scale,
                   const float* b_scale, const float* bias, float inverse, void* out,
                   int64_t out_stride) {
  int n = 0;
  for (; n + V::lanes <= cols; n += V::lanes) {
    const V scale = V::load(b_scale + n), offset = V::load(bias + n);
    Out* to = static_cast<Out*>(out) + n;
    for (int m = 0; m < rows; ++m, to += out_stride) {
      const V sum = V::load(acc + m * acc_stride + n);
      store_output(epilogue<kActivation>(sum, V(a_scale[m]), scale, offset), V(inverse), to);
    }
  }
  if (n == cols) return;
  const int rest = cols - n;
  const V scale = V::load_n(b_scale + n, rest), offset = V::load_n(bias + n, rest);
  Out* to = static_cast<Out*>(out) + n;
  for (int m = 0; m < rows; ++m, to += out_stride) {
    const V sum = V::load_n(acc + m * acc_stride + n, rest);
    store_output_n(epilogue<kActivation>(sum, V(a_scale[m]), scale, offset), V(inverse), to, rest);
  }
}

template <class V, Activation kActivation>
EpilogueFn choose_epilogue_dtype(tt_dtype out_dtype) {
  switch (out_dtype) {
    case TT_BF16: return epilogue_tile<V, kActivation, bf16>;
    case TT_F16: return epilogue_tile<V, kActivation, fp16>;
    case TT_I8: return epilogue_tile<V, kActivation, int8_t>;
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
