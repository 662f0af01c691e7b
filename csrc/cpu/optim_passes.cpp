#include <cmath>
#include <cstring>

#include "cpu/optim_blocks.h"
#include "cpu/optim_coded.h"
#include "cpu/optim_job.h"
#include "cpu/optim_rules.h"
#include "cpu/optim_window.h"
#include "math/norm.h"

namespace trimtab {

double sum_squares(OptimJob& job, const tt_parallel* parallel) {
  const tt_parallel* pool = job.total < kNormWorthThreads ? nullptr : parallel;
  for_pieces(job, pool, [&](int64_t i, int64_t begin, int64_t end) {
    const tt_optim_tensor& t = job.call.tensors[i];
    const char* grad = static_cast<const char*>(t.grad);
    float buffer[kOptimNormBlock];
    for (; begin < end; begin += kOptimNormBlock) {
      const int64_t n = std::min(end - begin, kOptimNormBlock);
      const char* from = grad + begin * bytes_of(t.grad_dtype);
      const float* g = reinterpret_cast<const float*>(from);
      if (t.grad_dtype != TT_F32 || t.mask) {
        job.kernels.widen(from, tt_dtype(t.grad_dtype), buffer, n);
        g = buffer;
      }
      if (t.mask) job.kernels.apply_mask(buffer, t.mask + begin, n);
      job.sums[job.block[i] + begin / kOptimNormBlock] = job.kernels.sum_squares(g, n);
    }
  });
  return add_up(job.block[job.call.n_tensors], [&](int64_t k) { return job.sums[k]; });
}

namespace {

// n <= kOptimBlock elements of a tensor from `begin` on.
void update_block(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s,
                  OptimUpdateFn rule, int64_t begin, int64_t n) {
  const OptimKernels& kernels = job.kernels;
  const unsigned signs = optim_rule(tt_rule(job.call.rule)).signs;
  ParamWindow param;
  Window grad;
  StateWindow state[TT_OPTIM_STATES];
  void* states[TT_OPTIM_STATES];
  param.open(kernels, job.memory, t, begin, n);
  grad.open(kernels, t.grad, t.grad_dtype, begin, n);
  for (int k = 0; k < s.states; ++k) {
    state[k].open(kernels, job.memory, t, k, signs >> k & 1, begin, n);
    states[k] = state[k].values;
  }
  const float* g = grad.values;
  if (job.scale != 1.0f || job.clip != 1.0f || s.sign != 1.0f) {
    g = prepare_block(job, s.sign, grad, n);
  }
  rule(s.constants, param.values, g, states, n);
  if (t.mask)
    for (int k = 0; k < s.states; ++k) kernels.apply_mask(state[k].values, t.mask + begin, n);
  const BlockRounding rounds(job, t, s.step, begin);
  for (int k = 0; k < s.states; ++k) state[k].close(kernels, rounds(1 + k), n);
  close_param(job, t, s.threshold, rounds(0), param, begin, n);
  if (job.call.zero_grad) std::memset(grad.data, 0, size_t(n * bytes_of(t.grad_dtype)));
}

// Elements [begin, end) of a tensor of fp32 whose gradient is scaled, clipped or negated and nothing else.
void update_prepared(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s,
                     OptimUpdateFn rule, int64_t begin, int64_t end) {
  alignas(64) float g[kOptimBlock];
  float* const p = static_cast<float*>(t.param);
  const float* const grad = static_cast<const float*>(t.grad);
  for (; begin < end; begin += kOptimBlock) {
    const int64_t n = std::min(end - begin, kOptimBlock);
    void* states[TT_OPTIM_STATES];
    for (int k = 0; k < s.states; ++k) states[k] = static_cast<float*>(t.state[k]) + begin;
    job.kernels.prepare(grad + begin, job.scale, job.clip, s.sign, g, n);
    rule(s.constants, p + begin, g, states, n);
  }
}

// Whether gradients in 16 bits come to the rule by one multiplication: dividing by a power of two is one.
bool has_factor(const OptimJob& job) {
  const uint32_t bits = float_bits(job.scale), exponent = bits >> 23;
  const bool inverts = (bits & 0x7fffffu) == 0 && exponent > 0 && exponent < 254;
  return !job.call.round_clipped && (job.scale == 1.0f || (job.clip == 1.0f && inverts));
}

// Elements [begin, end) of a tensor all in bf16; returns where whole vectors end, or those of one key.
int64_t update_halves(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s,
                      int64_t begin, int64_t end) {
  OptimHalves arrays;
  arrays.p = static_cast<bf16*>(t.param) + begin;
  arrays.master = t.master ? static_cast<uint16_t*>(t.master) + begin : nullptr;
  arrays.g = static_cast<const bf16*>(t.grad) + begin;
  for (int k = 0; k < s.states; ++k) arrays.states[k] = static_cast<bf16*>(t.state[k]) + begin;
  arrays.n = (std::min(end, (begin | 0xffffffff) + 1) - begin) / kMasterLanes * kMasterLanes;
  arrays.factor = 1.0f / job.scale * job.clip * s.sign;
  if (job.call.stochastic) {
    const uint64_t index = uint64_t(&t - job.call.tensors);
    for (int k = 0; k <= s.states; ++k) {
      const RandomKey key = random_key(job.call.seed, uint64_t(s.step), index, uint64_t(k));
      arrays.keys[k] = key_around(key, begin);
    }
  }
  arrays.element = uint32_t(begin);
  s.halves[t.master_kind](s.constants, arrays);
  return begin + arrays.n;
}

// Elements [begin, end) of a tensor: those of torch's vectors, or those of its tail.
void update_range(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s, bool tail,
                  int64_t begin, int64_t end) {
  const bool alone = t.grad_dtype == t.param_dtype && !(s.threshold > 0.0f) && !t.mask && !t.ema &&
                     !t.copy && !job.call.zero_grad;
  const bool bare = alone && job.scale == 1.0f && job.clip == 1.0f && s.sign == 1.0f;
  const bool one_dtype = t.state_dtype == t.param_dtype || s.states == 0;
  const bool scales = bare || has_factor(job);
  const bool rounds = job.call.stochastic && (t.param_dtype != TT_F32 || !one_dtype);
  if (begin >= end) return;
  const bool has_master = t.master_kind != TT_MASTER_NONE;
  if (bare && !rounds && one_dtype && !has_master) {
    const int64_t at = begin * bytes_of(t.param_dtype);
    void* states[TT_OPTIM_STATES];
    for (int k = 0; k < s.states; ++k) states[k] = static_cast<char*>(t.state[k]) + at;
    (tail ? s.typed_tail : s.typed_update)(s.constants, static_cast<char*>(t.param) + at,
                                           static_cast<const char*>(t.grad) + at, states,
                                           end - begin);
    return;
  }
  if (alone && one_dtype && t.param_dtype == TT_F32) {
    return update_prepared(job, t, s, tail ? s.tail : s.update, begin, end);
  }
  if (t.state_dtype == TT_DYNAMIC8 && !t.mask && s.coded) {
    begin = update_coded(job, t, s, begin, end);
  } else if (alone && t.param_dtype == TT_BF16 && one_dtype && rounds != has_master && !tail &&
             scales && s.halves[t.master_kind]) {
    begin = update_halves(job, t, s, begin, end);
  }
  for (; begin < end; begin += kOptimBlock) {
    update_block(job, t, s, tail ? s.tail : s.update, begin, std::min(end - begin, kOptimBlock));
  }
}

}  // namespace

void update(const OptimJob& job, const tt_parallel* parallel) {
  for_pieces(job, parallel, [&](int64_t i, int64_t begin, int64_t end) {
    const tt_optim_tensor& t = job.call.tensors[i];
    const OptimShared& s = job.shared[job.shared_of[i]];
    const int64_t lanes = 32 / bytes_of(arithmetic_dtype(t));  // of torch's vectors
    const bool whole = s.tail == s.update || t.state_dtype == TT_DYNAMIC8;  // scales span the tail
    const int64_t tail = whole ? t.numel : t.numel / lanes * lanes;
    update_range(job, t, s, false, begin, std::min(end, tail));
    update_range(job, t, s, true, std::max(begin, tail), end);
  });
}

namespace {

// Squares of n <= kOptimBlock elements of a tensor, and of the direction in which the rule would move them.
void probe_block(const OptimJob& job, const tt_optim_tensor& t, const OptimShared& s, int64_t begin,
                 int64_t n, double* squares) {
  const OptimKernels& kernels = job.kernels;
  const unsigned signs = optim_rule(tt_rule(job.call.rule)).signs;
  ParamWindow param;
  Window grad;
  StateWindow state[TT_OPTIM_STATES];
  void* states[TT_OPTIM_STATES];
  const auto copy = [n](Window& window) {
    if (window.values != window.buffer) std::memcpy(window.buffer, window.values, size_t(n) * 4);
    return window.buffer;
  };
  param.open(kernels, job.memory, t, begin, n);
  float* const p = copy(param);
  for (int k = 0; k < s.states; ++k) {
    state[k].open(kernels, job.memory, t, k, signs >> k & 1, begin, n);
    states[k] = copy(state[k]);
  }
  grad.open(kernels, t.grad, t.grad_dtype, begin, n);
  const float* const g = prepare_block(job, s.sign, grad, n);
  squares[0] += kernels.sum_squares(p, n);
  s.probe(s.constants, p, g, states, n);
  if (t.mask) kernels.apply_mask(p, t.mask + begin, n);
  squares[1] += kernels.sum_squares(p, n);
}

}  // namespace

void probe(OptimJob& job, const tt_parallel* parallel, double* squares) {
  const tt_optim_call& call = job.call;
  for_pieces(job, parallel, [&](int64_t i, int64_t begin, int64_t end) {
    const OptimShared& s = job.shared[job.shared_of[i]];
    for (; begin < end; begin += kOptimNormBlock) {
      const int64_t block_end = std::min(end, begin + kOptimNormBlock);
      double found[2] = {0.0, 0.0};
      for (int64_t at = begin; at < block_end; at += kOptimBlock) {
        probe_block(job, call.tensors[i], s, at, std::min(block_end - at, kOptimBlock), found);
      }
      const int64_t block = job.block[i] + begin / kOptimNormBlock;
      job.sums[block] = found[0];
      job.direction_sums[block] = found[1];
    }
  });
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const int64_t first = job.block[i], blocks = job.block[i + 1] - first;
    squares[2 * i] = add_up(blocks, [&](int64_t k) { return job.sums[first + k]; });
    squares[2 * i + 1] = add_up(blocks, [&](int64_t k) { return job.direction_sums[first + k]; });
  }
}

void adapt(OptimJob& job, const double* squares) {
  const OptimRule& rule = optim_rule(tt_rule(job.call.rule));
  for (int64_t i = 0; i < job.call.n_tensors; ++i) {
    if (job.call.tensors[i].grad == nullptr) continue;
    rule.adapt(job.shared[job.shared_of[i]].constants, std::sqrt(squares[2 * i]),
               std::sqrt(squares[2 * i + 1]));
  }
}

}  // namespace trimtab
