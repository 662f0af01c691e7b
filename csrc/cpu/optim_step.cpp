// optim_step: all elements of all tensors as one line, cut into equal tasks.
//
//   pass 0   only where a norm is asked for: partial sums of squares, one a block of 4096 elements of a
//            tensor, added up in order; the same norm for any number of threads
//   probe    LAMB: of each tensor the norm, and that of its direction, by the same blocks
//   pass 1   unscale, clip, rule, shrink, mask, average, copy, zero: each element comes from memory and
//            goes back once
#include <trimtab/optim_step.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/optim_kernels.h"
#include "cpu/optim_rules.h"
#include "cpu/optim_window.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/status.h"
#include "math/dtypes.h"
#include "math/norm.h"

namespace trimtab {
namespace {

// A task is big enough that starting it costs nothing, and small enough that threads end together.
constexpr int64_t kMinTask = 4 * kOptimNormBlock, kMaxTask = 16 * kOptimNormBlock;
constexpr int64_t kWorthThreads = 32768;  // elements; below, waking a thread costs what it saves

bool is_dtype(int dtype) { return dtype == TT_F32 || dtype == TT_BF16 || dtype == TT_F16; }

// A remainder makes the parameter an fp32 one.
int arithmetic_dtype(const tt_optim_tensor& t) {
  return t.master_kind == TT_MASTER_REMAINDER ? int(TT_F32) : t.param_dtype;
}

// What all elements of a tensor share; tensors of one group and step count share it too.
struct Shared {
  float constants[kOptimConstants];
  // Of whole vectors of torch's, and of the rest; in fp32, and in the parameter's dtype.
  OptimUpdateFn update, tail, typed_update, typed_tail;
  OptimUpdateFn probe;  // NULL: the rule needs no norm of a tensor
  int states;
  float sign, threshold;  // of the gradient; of the shrinkage
  // what it was computed from, and NAdam's product after this step
  double step;
  float product_before, product;
  int fresh, dtype;
};

struct Job {
  const tt_optim_call& call;
  OptimKernels kernels;
  OptimMemoryKernels memory;
  int64_t total;  // elements
  int64_t* offset;  // [n + 1] of each tensor's first element among all
  int64_t* block;  // [n + 1] of its first partial sum
  double* sums;  // [block[n]]
  double* direction_sums;  // [block[n]], where the rule has a probe
  int32_t* shared_of;  // [n] index into shared
  int32_t* latest;  // [groups] index of the last entry made for a group, -1: none
  Shared* shared;
  float scale, clip;
};

tt_status check(const tt_optim_call& call) {
  const auto bad = [](int64_t i, const char* what) {
    return set_error(TT_INVALID_ARGUMENT, "optim_step: tensor %lld: expected %s", (long long)i,
                     what);
  };
  if (call.rule < 0 || call.rule >= TT_RULES) {
    return set_error(TT_INVALID_ARGUMENT, "optim_step: expected a tt_rule, got %d", call.rule);
  }
  if (call.n_tensors < 0 || call.n_groups < 0 || (call.n_tensors > 0 && !call.tensors) ||
      (call.n_groups > 0 && !call.groups)) {
    return set_error(TT_INVALID_ARGUMENT, "optim_step: expected tensors and groups");
  }
  const OptimRule& rule = optim_rule(tt_rule(call.rule));
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad == nullptr) continue;
    if (t.numel < 0) return bad(i, "numel >= 0");
    if (t.group < 0 || t.group >= call.n_groups) return bad(i, "group to be an index into groups");
    if (!is_dtype(t.param_dtype) || !is_dtype(t.grad_dtype) ||
        (!is_dtype(t.state_dtype) && t.state_dtype != TT_DYNAMIC8) ||
        (t.copy && !is_dtype(t.copy_dtype))) {
      return bad(i, "float32, bfloat16 or float16");
    }
    if (t.master_kind < 0 || t.master_kind > TT_MASTER_REMAINDER) return bad(i, "a tt_master");
    if (t.master_kind != TT_MASTER_NONE && t.param_dtype != TT_BF16) {
      return bad(i, "bfloat16 where there is a master");
    }
    if (t.master_kind != TT_MASTER_NONE && t.master == nullptr && t.numel > 0) {
      return bad(i, "master, got NULL");
    }
    if (t.param == nullptr && t.numel > 0) return bad(i, "param, got NULL");
    if ((rule.counts_steps || call.stochastic) && t.step == nullptr)
      return bad(i, "step, got NULL");
    if (rule.has_product && t.product == nullptr) return bad(i, "product, got NULL");
    const int states = rule.states(rule.variant(call.groups[t.group], t.fresh != 0));
    for (int k = 0; k < states; ++k)
      if (t.numel > 0 &&
          (t.state[k] == nullptr || (t.state_dtype == TT_DYNAMIC8 && t.scale[k] == nullptr)))
        return bad(i, "all of the rule's states, got NULL");
  }
  return TT_OK;
}

// Carves the job's arrays out of this thread's scratch memory; false if there is none.
bool reserve(Job& job) {
  const tt_optim_call& call = job.call;
  const int64_t n = call.n_tensors;
  int64_t blocks = 0;
  for (int64_t i = 0; i < n; ++i)
    if (call.tensors[i].grad) blocks += call.tensors[i].numel / kOptimNormBlock + 1;
  char* at = nullptr;
  const auto carve = [&at](auto*& array, int64_t count) {
    using T = typename std::remove_reference<decltype(*array)>::type;
    at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + 63) & ~uintptr_t(63));
    array = reinterpret_cast<T*>(at);
    at += count * int64_t(sizeof(T));
  };
  for (int pass = 0; pass < 2; ++pass) {  // the first measures
    if (pass == 1)
      at = static_cast<char*>(thread_scratch(int64_t(at - (char*)nullptr), Scratch::kOptim));
    if (pass == 1 && at == nullptr) return false;
    carve(job.offset, n + 1);
    carve(job.block, n + 1);
    carve(job.sums, blocks);
    carve(job.direction_sums, optim_rule(tt_rule(call.rule)).probe ? blocks : 0);
    carve(job.shared_of, n);
    carve(job.latest, call.n_groups);
    carve(job.shared, n);
  }
  job.offset[0] = job.block[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t numel = call.tensors[i].grad ? call.tensors[i].numel : 0;
    job.offset[i + 1] = job.offset[i] + numel;
    job.block[i + 1] = job.block[i] + (numel + kOptimNormBlock - 1) / kOptimNormBlock;
  }
  job.total = job.offset[n];
  return true;
}

void make_shared(Job& job) {
  const tt_optim_call& call = job.call;
  const OptimRule& rule = optim_rule(tt_rule(call.rule));
  std::fill_n(job.latest, call.n_groups, -1);
  int32_t count = 0;
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad == nullptr) continue;
    const double step = t.step ? double(*t.step + 1.0f) : 1.0;
    const float product = t.product ? *t.product : 1.0f;
    int32_t& latest = job.latest[t.group];
    if (latest < 0 || rule.probe || job.shared[latest].step != step ||
        job.shared[latest].fresh != t.fresh || job.shared[latest].product_before != product ||
        job.shared[latest].dtype != arithmetic_dtype(t)) {
      const tt_optim_group& group = call.groups[t.group];
      Shared& s = job.shared[latest = count++];
      const int variant = rule.variant(group, t.fresh != 0);
      const int tail = variant | (call.torch_tails ? rule.tail : 0);
      const auto loop = [&](int v, int dtype) {
        return job.kernels.update(tt_rule(call.rule), v, tt_dtype(dtype));
      };
      s.update = loop(variant, TT_F32);
      s.tail = loop(tail, TT_F32);
      s.typed_update = loop(variant, arithmetic_dtype(t));
      s.typed_tail = loop(tail, arithmetic_dtype(t));
      s.probe = rule.probe ? loop(variant | rule.probe, TT_F32) : nullptr;
      s.states = rule.states(variant);
      s.sign = group.flags & TT_MAXIMIZE ? -1.0f : 1.0f;
      s.threshold = float(group.lr * group.l1);
      s.step = step;
      s.fresh = t.fresh;
      s.dtype = arithmetic_dtype(t);
      s.product_before = s.product = product;
      rule.constants(group, {step, &s.product, tt_dtype(arithmetic_dtype(t))}, s.constants);
    }
    job.shared_of[i] = latest;
  }
}

// Runs body(i, begin, end), over elements [begin, end) of tensor i, for all tensors, in equal tasks.
// Cuts lie at multiples of kOptimNormBlock within a tensor.
template <class Body>
void for_pieces(const Job& job, const tt_parallel* parallel, Body&& body) {
  const int64_t n = job.call.n_tensors;
  const tt_parallel pool = pool_or_serial(parallel, job.total >= kWorthThreads);
  const int64_t share = job.total / (int64_t(pool.threads) * 4) + 1;
  const int64_t task = std::min(std::max(share, kMinTask), kMaxTask);
  const auto locate = [&](int64_t element, int64_t* within) {
    *within = 0;
    if (element >= job.total) return n;
    const int64_t i = std::upper_bound(job.offset, job.offset + n + 1, element) - job.offset - 1;
    *within = (element - job.offset[i]) / kOptimNormBlock * kOptimNormBlock;
    return i;
  };
  parallel_run(pool, (job.total + task - 1) / task, [&](int64_t at) {
    int64_t begin, end;
    int64_t i = locate(at * task, &begin);
    const int64_t last = locate((at + 1) * task, &end);
    for (; i < last; ++i, begin = 0) {
      const int64_t numel = job.offset[i + 1] - job.offset[i];
      if (begin < numel) body(i, begin, numel);
    }
    if (i == last && begin < end) body(i, begin, end);
  });
}

// Sum of squares of all gradients, as they are in memory.
double sum_squares(Job& job, const tt_parallel* parallel) {
  for_pieces(job, parallel, [&](int64_t i, int64_t begin, int64_t end) {
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
  double sums[kNormSums] = {};
  for (int64_t k = 0; k < job.block[job.call.n_tensors]; ++k) sums[k % kNormSums] += job.sums[k];
  for (int half = kNormSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// A block of gradients unscaled, clipped and with the sign that minimizes, into its buffer.
const float* prepare_block(const Job& job, const Shared& s, Window& grad, int64_t n) {
  const OptimKernels& kernels = job.kernels;
  const bool rounds = job.call.round_clipped && grad.dtype != TT_F32;
  if (!rounds) {
    kernels.prepare(grad.values, job.scale, job.clip, s.sign, grad.buffer, n);
    return grad.buffer;
  }
  uint16_t rounded[kOptimBlock];
  const auto round = [&] {
    kernels.narrow(grad.buffer, rounded, tt_dtype(grad.dtype), n);
    kernels.widen(rounded, tt_dtype(grad.dtype), grad.buffer, n);
  };
  kernels.prepare(grad.values, job.scale, 1.0f, s.sign, grad.buffer, n);
  round();
  kernels.prepare(grad.buffer, 1.0f, job.clip, 1.0f, grad.buffer, n);
  round();
  return grad.buffer;
}

// n <= kOptimBlock elements of a tensor from `begin` on.
void update_block(const Job& job, const tt_optim_tensor& t, const Shared& s, OptimUpdateFn rule,
                  int64_t begin, int64_t n) {
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
    g = prepare_block(job, s, grad, n);
  }
  rule(s.constants, param.values, g, states, n);
  if (s.threshold > 0.0f) kernels.shrink(param.values, s.threshold, n);
  if (t.mask) {
    kernels.apply_mask(param.values, t.mask + begin, n);
    for (int k = 0; k < s.states; ++k) kernels.apply_mask(state[k].values, t.mask + begin, n);
  }
  RandomKey keys[TT_OPTIM_STATES + 1];
  const auto rounding = [&](int stream) {
    const bool random = job.call.stochastic != 0;
    if (random) {
      const uint64_t index = uint64_t(&t - job.call.tensors);
      keys[stream] = random_key(job.call.seed, uint64_t(s.step), index, uint64_t(stream));
    }
    return WindowRounding{&job.memory, random ? &keys[stream] : nullptr, begin};
  };
  param.close(kernels, rounding(0), n);
  for (int k = 0; k < s.states; ++k) state[k].close(kernels, rounding(1 + k), n);
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
  if (job.call.zero_grad) std::memset(grad.data, 0, size_t(n * bytes_of(t.grad_dtype)));
}

// Elements [begin, end) of a tensor: those of torch's vectors, or those of its tail.
void update_range(const Job& job, const tt_optim_tensor& t, const Shared& s, bool tail,
                  int64_t begin, int64_t end) {
  const bool one_dtype =
      t.grad_dtype == t.param_dtype && (t.state_dtype == t.param_dtype || s.states == 0);
  const bool bare = one_dtype && job.scale == 1.0f && job.clip == 1.0f && s.sign == 1.0f &&
                    t.master_kind == TT_MASTER_NONE &&
                    (!job.call.stochastic || t.param_dtype == TT_F32) && !(s.threshold > 0.0f) &&
                    !t.mask && !t.ema && !t.copy && !job.call.zero_grad;
  if (bare && begin < end) {
    const int64_t at = begin * bytes_of(t.param_dtype);
    void* states[TT_OPTIM_STATES];
    for (int k = 0; k < s.states; ++k) states[k] = static_cast<char*>(t.state[k]) + at;
    (tail ? s.typed_tail : s.typed_update)(s.constants, static_cast<char*>(t.param) + at,
                                           static_cast<const char*>(t.grad) + at, states,
                                           end - begin);
    return;
  }
  for (; begin < end; begin += kOptimBlock) {
    update_block(job, t, s, tail ? s.tail : s.update, begin, std::min(end - begin, kOptimBlock));
  }
}

void update(const Job& job, const tt_parallel* parallel) {
  for_pieces(job, parallel, [&](int64_t i, int64_t begin, int64_t end) {
    const tt_optim_tensor& t = job.call.tensors[i];
    const Shared& s = job.shared[job.shared_of[i]];
    const int64_t lanes = 32 / bytes_of(arithmetic_dtype(t));  // of torch's vectors
    const bool whole = s.tail == s.update || t.state_dtype == TT_DYNAMIC8;  // scales span the tail
    const int64_t tail = whole ? t.numel : t.numel / lanes * lanes;
    update_range(job, t, s, false, begin, std::min(end, tail));
    update_range(job, t, s, true, std::max(begin, tail), end);
  });
}

// Squares of n <= kOptimBlock elements of a tensor, and of the direction in which the rule would move them.
void probe_block(const Job& job, const tt_optim_tensor& t, const Shared& s, int64_t begin,
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
  const float* const g = prepare_block(job, s, grad, n);
  squares[0] += kernels.sum_squares(p, n);
  s.probe(s.constants, p, g, states, n);
  if (t.mask) kernels.apply_mask(p, t.mask + begin, n);
  squares[1] += kernels.sum_squares(p, n);
}

// Norms of each tensor and of its direction into its constants, if the rule steps by them.
void adapt(Job& job, const tt_parallel* parallel) {
  const tt_optim_call& call = job.call;
  const OptimRule& rule = optim_rule(tt_rule(call.rule));
  if (rule.adapt == nullptr) return;
  for_pieces(job, parallel, [&](int64_t i, int64_t begin, int64_t end) {
    const Shared& s = job.shared[job.shared_of[i]];
    for (; begin < end; begin += kOptimNormBlock) {
      const int64_t block_end = std::min(end, begin + kOptimNormBlock);
      double squares[2] = {0.0, 0.0};
      for (int64_t at = begin; at < block_end; at += kOptimBlock) {
        probe_block(job, call.tensors[i], s, at, std::min(block_end - at, kOptimBlock), squares);
      }
      const int64_t block = job.block[i] + begin / kOptimNormBlock;
      job.sums[block] = squares[0];
      job.direction_sums[block] = squares[1];
    }
  });
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    if (call.tensors[i].grad == nullptr) continue;
    double squares[2] = {0.0, 0.0};
    for (int64_t block = job.block[i]; block < job.block[i + 1]; ++block) {
      squares[0] += job.sums[block];
      squares[1] += job.direction_sums[block];
    }
    rule.adapt(job.shared[job.shared_of[i]].constants, std::sqrt(squares[0]),
               std::sqrt(squares[1]));
  }
}

void skip(const Job& job, const tt_parallel* parallel) {
  if (job.call.skipped) ++*job.call.skipped;
  if (!job.call.zero_grad) return;
  for_pieces(job, parallel, [&](int64_t i, int64_t begin, int64_t end) {
    const tt_optim_tensor& t = job.call.tensors[i];
    const int64_t size = bytes_of(t.grad_dtype);
    std::memset(static_cast<char*>(t.grad) + begin * size, 0, size_t((end - begin) * size));
  });
}

// The coefficient as clip_grad_norm_ computes it, in the dtype that stacking all norms gives.
float rounded_clip(const tt_optim_call& call, double norm) {
  int dtype = -1;
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad == nullptr || t.grad_dtype == dtype) continue;
    dtype = dtype < 0 ? t.grad_dtype : int(TT_F32);
  }
  const auto round = [dtype](float x) { return round_to(tt_dtype(dtype), x); };
  const float inverse = round(1.0f / round(round(float(norm)) + 1e-6f));
  const float factor = round(inverse * float(call.max_norm));
  return factor >= 1.0f ? 1.0f : factor;  // NaN goes through, as there
}

// False: the gradients are not finite, and such a step is to be skipped.
bool clip(Job& job, const tt_parallel* parallel) {
  const tt_optim_call& call = job.call;
  job.clip = 1.0f;
  job.scale = call.grad_scale ? *call.grad_scale : 1.0f;
  if (call.max_norm < 0.0 && !call.skip_nonfinite && !call.norm) return true;
  double norm = call.given_norm ? double(*call.given_norm) : 0.0;
  if (call.given_norm == nullptr || call.skip_nonfinite) {
    const double found = std::sqrt(sum_squares(job, parallel)) / double(job.scale);
    if (call.skip_nonfinite && !std::isfinite(found)) {
      if (call.norm) *call.norm = float(found);
      return false;
    }
    if (call.given_norm == nullptr) norm = found;
  }
  if (call.norm) *call.norm = float(norm);
  if (call.max_norm >= 0.0 && call.round_clipped) {
    job.clip = rounded_clip(call, norm);
  } else if (call.max_norm >= 0.0) {
    const double factor = call.max_norm / (norm + 1e-6);  // torch.nn.utils.clip_grad_norm_
    if (!(factor >= 1.0)) job.clip = float(factor);  // NaN goes through, as there
  }
  return true;
}

void count_steps(const Job& job) {
  for (int64_t i = 0; i < job.call.n_tensors; ++i) {
    const tt_optim_tensor& t = job.call.tensors[i];
    if (t.grad == nullptr) continue;
    if (t.step) *t.step += 1.0f;
    if (t.product) *t.product = job.shared[job.shared_of[i]].product;
  }
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_optim_step(const tt_optim_call* call, const tt_parallel* parallel) {
  if (call == nullptr) return set_error(TT_INVALID_ARGUMENT, "optim_step: call is NULL");
  tt_status status = check(*call);
  if (status != TT_OK) return status;
  tt_isa isa;
  status = current_isa(&isa);
  if (status != TT_OK) return status;
  Job job{*call,   {},      {},      0,       nullptr, nullptr, nullptr,
          nullptr, nullptr, nullptr, nullptr, 1.0f,    1.0f};
  job.kernels = isa >= TT_ISA_AVX512   ? optim_kernels_avx512()
                : isa == TT_ISA_SCALAR ? optim_kernels_scalar()
                                       : optim_kernels_avx2();
  status = optim_memory_kernels(&job.memory);
  if (status != TT_OK) return status;
  if (!reserve(job)) return set_error(TT_OUT_OF_MEMORY, "optim_step: no memory for the tables");
  const bool overflowed = call->found_inf && *call->found_inf != 0.0f;
  if (overflowed || !clip(job, parallel)) {
    skip(job, parallel);
    return TT_OK;
  }
  make_shared(job);
  adapt(job, parallel);
  update(job, parallel);
  count_steps(job);
  return TT_OK;
}
