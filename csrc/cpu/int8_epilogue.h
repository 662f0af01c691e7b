// The epilogue over a tile of sums, one function an (activation, dtype) pair. Internal linkage:
// included once an instruction set.
#pragma once
#include "cpu/int8_kernels.h"
#include "math/epilogue.h"

namespace trimtab {
namespace {

template <class V, Activation kActivation, class Out>
void epilogue_tile(const int32_t* acc, int rows, int cols, const float* a_scale,
                   const float* b_scale, const float* bias, void* out, int64_t out_stride) {
  Out* to = static_cast<Out*>(out);
  for (int row = 0; row < rows; ++row, acc += kMaxTileN, to += out_stride) {
    const V row_scale(a_scale[row]);
    int n = 0;
    for (; n + V::lanes <= cols; n += V::lanes) {
      epilogue<kActivation>(V::load(acc + n), row_scale, V::load(b_scale + n), V::load(bias + n))
          .store(to + n);
    }
    if (n < cols) {
      const int rest = cols - n;
      epilogue<kActivation>(V::load_n(acc + n, rest), row_scale, V::load_n(b_scale + n, rest),
                            V::load_n(bias + n, rest))
          .store_n(to + n, rest);
    }
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
