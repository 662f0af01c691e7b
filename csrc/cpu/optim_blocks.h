// What happens to a block of a tensor's elements in L1 before and after its update, whatever the update is.
#pragma once
#include "cpu/optim_job.h"
#include "cpu/optim_window.h"

namespace trimtab {
namespace {

// A block of gradients unscaled, clipped and with the sign that minimizes, into its buffer.
inline const float* prepare_block(const OptimJob& job, float sign, Window& grad, int64_t n) {
  const OptimKernels& kernels = job.kernels;
  const bool rounds = job.call.round_clipped && grad.dtype != TT_F32;
  if (!rounds) {
    kernels.prepare(grad.values, job.scale, job.clip, sign, grad.buffer, n);
    return grad.buffer;
  }
  uint16_t rounded[kOptimBlock];
  const auto round = [&] {
    kernels.narrow(grad.buffer, rounded, tt_dtype(grad.dtype), n);
    kernels.widen(rounded, tt_dtype(grad.dtype), grad.buffer, n);
  };
  kernels.prepare(grad.values, job.scale, 1.0f, sign, grad.buffer, n);
  round();
  kernels.prepare(grad.buffer, 1.0f, job.clip, 1.0f, grad.buffer, n);
  round();
  return grad.buffer;
}

// How each array of a tensor rounds: number 0 its parameter, 1 + k its state k.
class BlockRounding {
 public:
  BlockRounding(const OptimJob& job, const tt_optim_tensor& t, double step, int64_t begin)
      : kernels_(&job.memory), random_(job.call.stochastic != 0), begin_(begin) {
    if (!random_) return;
    const uint64_t index = uint64_t(&t - job.call.tensors);
    for (int stream = 0; stream <= TT_OPTIM_STATES; ++stream)
      keys_[stream] = random_key(job.call.seed, uint64_t(step), index, uint64_t(stream));
  }
  WindowRounding operator()(int stream) const {
    return {kernels_, random_ ? &keys_[stream] : nullptr, begin_};
  }

 private:
  const OptimMemoryKernels* kernels_;
  bool random_;
  int64_t begin_;
  RandomKey keys_[TT_OPTIM_STATES + 1];
};

// After the update: shrinks, masks, stores, copies and averages n parameters from `begin` on.
inline void close_param(const OptimJob& job, const tt_optim_tensor& t, float threshold,
                        const WindowRounding& rounding, ParamWindow& param, int64_t begin,
                        int64_t n) {
  const OptimKernels& kernels = job.kernels;
  if (threshold > 0.0f) kernels.shrink(param.values, threshold, n);
  if (t.mask) kernels.apply_mask(param.values, t.mask + begin, n);
  param.close(kernels, rounding, n);
  if (t.copy) {
    char* copy = static_cast<char*>(t.copy) + begin * bytes_of(t.copy_dtype);
    kernels.narrow(param.values, copy, tt_dtype(t.copy_dtype), n);
  }
  if (t.ema) {  // of the parameter as it was stored
    if (param.dtype != TT_F32 && param.kind == TT_MASTER_NONE) {
      kernels.widen(param.data, tt_dtype(param.dtype), param.buffer, n);
    }
    kernels.average(t.ema + begin, param.values, float(1.0 - job.call.ema_decay), n);
  }
}

}  // namespace
}  // namespace trimtab
