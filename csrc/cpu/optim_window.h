// Windows: kOptimBlock elements of one of a tensor's arrays as fp32, whatever they are in memory.
#pragma once
#include <trimtab/optim_step.h>

#include "cpu/optim_kernels.h"
#include "cpu/optim_memory.h"

namespace trimtab {
namespace {

inline int64_t bytes_of(int dtype) { return dtype == TT_F32 ? 4 : dtype == TT_DYNAMIC8 ? 1 : 2; }

// How an array rounds on its way back.
struct WindowRounding {
  const OptimMemoryKernels* kernels;
  const RandomKey* key;  // NULL: to nearest
  int64_t element;  // number of the window's first
};

struct Window {
  char* data = nullptr;
  int dtype = TT_F32;
  float* values = nullptr;  // the elements themselves, or the buffer
  alignas(64) float buffer[kOptimBlock];

  void open(const OptimKernels& kernels, void* array, int array_dtype, int64_t begin, int64_t n) {
    dtype = array_dtype;
    data = static_cast<char*>(array) + begin * bytes_of(dtype);
    values = dtype == TT_F32 ? reinterpret_cast<float*>(data) : buffer;
    if (dtype != TT_F32) kernels.widen(data, tt_dtype(dtype), buffer, n);
  }
  void close(const OptimKernels& kernels, const WindowRounding& rounding, int64_t n) {
    if (dtype == TT_F32) return;
    if (dtype == TT_BF16 && rounding.key) {
      bf16* to = reinterpret_cast<bf16*>(data);
      return rounding.kernels->narrow_stochastic(buffer, *rounding.key, rounding.element, to, n);
    }
    kernels.narrow(buffer, data, tt_dtype(dtype), n);
  }
};

// A state; 8-bit ones begin at a multiple of kDynamicBlock.
struct StateWindow : Window {
  float* scale = nullptr;
  bool is_signed = false;

  void open(const OptimKernels& kernels, const OptimMemoryKernels& memory, const tt_optim_tensor& t,
            int k, bool with_sign, int64_t begin, int64_t n) {
    if (t.state_dtype != TT_DYNAMIC8) {
      return Window::open(kernels, t.state[k], t.state_dtype, begin, n);
    }
    dtype = TT_DYNAMIC8;
    data = static_cast<char*>(t.state[k]) + begin;
    scale = t.scale[k] + begin / kDynamicBlock;
    is_signed = with_sign;
    values = buffer;
    memory.decode(reinterpret_cast<uint8_t*>(data), scale, is_signed, buffer, n);
  }
  void close(const OptimKernels& kernels, const WindowRounding& rounding, int64_t n) {
    if (dtype != TT_DYNAMIC8) return Window::close(kernels, rounding, n);
    rounding.kernels->encode(buffer, is_signed, rounding.key, rounding.element,
                             reinterpret_cast<uint8_t*>(data), scale, n);
  }
};

// A parameter, with its master.
struct ParamWindow : Window {
  uint16_t* master = nullptr;
  int kind = TT_MASTER_NONE;

  void open(const OptimKernels& kernels, const OptimMemoryKernels& memory, const tt_optim_tensor& t,
            int64_t begin, int64_t n) {
    kind = t.master_kind;
    if (kind == TT_MASTER_NONE) return Window::open(kernels, t.param, t.param_dtype, begin, n);
    dtype = t.param_dtype;
    data = static_cast<char*>(t.param) + begin * bytes_of(dtype);
    master = static_cast<uint16_t*>(t.master) + begin;
    values = buffer;
    const bf16* p = reinterpret_cast<const bf16*>(data);
    (kind == TT_MASTER_KAHAN ? memory.open_kahan : memory.open_remainder)(p, master, buffer, n);
  }
  void close(const OptimKernels& kernels, const WindowRounding& rounding, int64_t n) {
    if (kind == TT_MASTER_NONE) return Window::close(kernels, rounding, n);
    bf16* p = reinterpret_cast<bf16*>(data);
    (kind == TT_MASTER_KAHAN ? rounding.kernels->close_kahan : rounding.kernels->close_remainder)(
        buffer, p, master, n);
  }
};

}  // namespace
}  // namespace trimtab
