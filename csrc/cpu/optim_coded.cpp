#include "cpu/optim_coded.h"

#include <cstring>

#include "cpu/optim_blocks.h"
#include "cpu/optim_window.h"

namespace trimtab {
namespace {

// Of the lines that lie two blocks on; fp32 ones the kernel asks for itself, a few at a time.
constexpr int64_t kAhead = 2 * kDynamicBlock;
inline void ask_ahead(const void* array, int dtype, int64_t begin) {
  const char* from = static_cast<const char*>(array) + (begin + kAhead) * bytes_of(dtype);
  for (int64_t byte = 0; byte < kDynamicBlock * bytes_of(dtype); byte += 64)
    __builtin_prefetch(from + byte, 1);
}

// A tensor's blocks one after the other: parameter and gradient as floats, wherever they come from.
class CodedBlocks {
 public:
  CodedBlocks(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s)
      : job_(job),
        t_(t),
        s_(s),
        random_(job.call.stochastic != 0),
        prepares_(job.scale != 1.0f || job.clip != 1.0f || s.sign != 1.0f) {
    const uint64_t index = uint64_t(&t - job.call.tensors);
    for (int k = 0; random_ && k <= s.states; ++k)
      keys_[k] = random_key(job.call.seed, uint64_t(s.step), index, uint64_t(k));
  }

  // floats, keys: room for the block's until it is encoded
  OptimCodedBlock open(int64_t begin, float (*floats)[kDynamicBlock], RandomKey* keys) {
    OptimCodedBlock block;
    param_.open(job_.kernels, job_.memory, t_, begin, kDynamicBlock);
    grad_.open(job_.kernels, t_.grad, t_.grad_dtype, begin, kDynamicBlock);
    block.p = param_.values;
    block.g = prepares_ ? prepare_block(job_, s_.sign, grad_, kDynamicBlock) : grad_.values;
    block.p_ahead = ahead(param_, t_.param, begin);
    block.g_ahead = ahead(grad_, t_.grad, begin);
    if (param_.kind != TT_MASTER_NONE) ask_ahead(t_.master, t_.param_dtype, begin);
    for (int k = 0; k < s_.states; ++k) {
      block.codes[k] = static_cast<uint8_t*>(t_.state[k]) + begin;
      block.scales[k] = t_.scale[k] + begin / kDynamicBlock;
      if (random_) keys[k] = key_around(keys_[1 + k], begin);
    }
    block.floats = floats;
    block.keys = random_ ? keys : nullptr;
    block.element = uint32_t(begin);
    return block;
  }

  void close(int64_t begin) {
    const WindowRounding rounding{&job_.memory, random_ ? &keys_[0] : nullptr, begin};
    close_param(job_, t_, s_.threshold, rounding, param_, begin, kDynamicBlock);
    if (job_.call.zero_grad) {
      std::memset(grad_.data, 0, size_t(kDynamicBlock * bytes_of(t_.grad_dtype)));
    }
  }

 private:
  static const char* ahead(const Window& window, const void* array, int64_t begin) {
    if (window.dtype == TT_F32) return window.data + kAhead * int64_t(sizeof(float));
    ask_ahead(array, window.dtype, begin);
    return reinterpret_cast<const char*>(window.buffer);
  }

  const OptimJob& job_;
  const tt_optim_tensor& t_;
  const OptimShared& s_;
  const bool random_, prepares_;
  RandomKey keys_[1 + TT_OPTIM_STATES];
  ParamWindow param_;
  Window grad_;
};

}  // namespace

int64_t update_coded(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s,
                     int64_t begin, int64_t end) {
  const int64_t count = (end - begin) / kDynamicBlock;
  if (count <= 0) return begin;
  alignas(64) float floats[2][TT_OPTIM_STATES][kDynamicBlock];
  RandomKey keys[2][TT_OPTIM_STATES];
  OptimCodedBlock blocks[2];
  CodedBlocks tensor(job, t, s);
  for (int64_t i = 0; i < count; ++i, begin += kDynamicBlock) {
    const int now = int(i & 1);
    blocks[now] = tensor.open(begin, floats[now], keys[now]);
    s.coded(s.constants, &blocks[now], i > 0 ? &blocks[1 - now] : nullptr);
    tensor.close(begin);
  }
  s.coded(s.constants, nullptr, &blocks[(count - 1) & 1]);
  return begin;
}

}  // namespace trimtab
