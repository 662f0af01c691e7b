// optim_step: all elements of all tensors as one line, cut into equal tasks.
//
//   pass 0   only where a norm is asked for: partial sums of squares, one a block of 4096 elements of a
//            tensor, added up in order; the same norm for any number of threads
//   probe    LAMB: of each tensor the norm, and that of its direction, by the same blocks
//   pass 1   unscale, clip, rule, shrink, mask, average, copy, zero: each element comes from memory and
//            goes back once
#include <trimtab/optim_step.h>

#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/optim_job.h"
#include "cpu/optim_rules.h"
#include "cpu/optim_window.h"
#include "cpu/scratch.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

bool is_dtype(int dtype) { return dtype == TT_F32 || dtype == TT_BF16 || dtype == TT_F16; }

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
bool reserve(OptimJob& job) {
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

void make_shared(OptimJob& job) {
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
      OptimShared& s = job.shared[latest = count++];
      const int variant = rule.variant(group, t.fresh != 0);
      const int tail = variant | (call.torch_tails ? rule.tail : 0);
      const auto loop = [&](int v, int dtype) {
        return job.kernels.update(tt_rule(call.rule), v, tt_dtype(dtype));
      };
      s.update = loop(variant, TT_F32);
      s.tail = loop(tail, TT_F32);
      s.typed_update = loop(variant, arithmetic_dtype(t));
      s.typed_tail = loop(tail, arithmetic_dtype(t));
      s.coded = job.memory.coded ? job.memory.coded(tt_rule(call.rule), variant) : nullptr;
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

void skip(const OptimJob& job, const tt_parallel* parallel) {
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
bool clip(OptimJob& job, const tt_parallel* parallel) {
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

void count_steps(const OptimJob& job) {
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
  OptimJob job{*call,   {},      {},      0,       nullptr, nullptr, nullptr,
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
