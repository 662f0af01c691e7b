// optim_step: all elements of all tensors as one line, cut into equal tasks.
//
//   pass 0   only where a norm is asked for: partial sums of squares, one a block of 4096 elements of a
//            tensor, added up in order; the same norm for any number of threads
//   probe    LAMB: of each tensor the norm, and that of its direction, by the same blocks
//   pass 1   unscale, clip, rule, shrink, mask, average, copy, zero: each element comes from memory and
//            goes back once
#include <trimtab/optim_squares.h>

#include "cpu/optim_job.h"
#include "cpu/optim_rules.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

tt_status check(const tt_optim_call& call) {
  if (call.rule < 0 || call.rule >= TT_RULES) {
    return set_error(TT_INVALID_ARGUMENT, "optim_step: expected a tt_rule, got %d", call.rule);
  }
  const OptimRule& rule = optim_rule(tt_rule(call.rule));
  return check_call(call, "optim_step", [&rule](const tt_optim_tensor& t, const tt_optim_group& g) {
    const int states = rule.states(rule.variant(g, t.fresh != 0));
    return OptimNeeds{rule.counts_steps, rule.has_product, states, true};
  });
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
      s.coded = job.memory.coded
                    ? job.memory.coded(tt_rule(call.rule), variant, call.stochastic != 0)
                    : nullptr;
      for (int master = TT_MASTER_NONE; master <= TT_MASTER_REMAINDER; ++master) {
        const auto& halves = job.memory.halves;
        s.halves[master] = halves ? halves(tt_rule(call.rule), variant, master) : nullptr;
      }
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

void count_steps(const OptimJob& job) {
  for (int64_t i = 0; i < job.call.n_tensors; ++i) {
    const tt_optim_tensor& t = job.call.tensors[i];
    if (t.grad == nullptr) continue;
    if (t.step) *t.step += 1.0f;
    if (t.product) *t.product = job.shared[job.shared_of[i]].product;
  }
}

// found: receives the squares of rules with a probe, and nothing else happens; given: takes their place.
tt_status run_step(const tt_optim_call* call, double* found, const double* given,
                   const tt_parallel* parallel) {
  if (call == nullptr) return set_error(TT_INVALID_ARGUMENT, "optim_step: call is NULL");
  tt_status status = check(*call);
  if (status != TT_OK) return status;
  const bool probes = optim_rule(tt_rule(call->rule)).probe != 0;
  const bool in_parts = found != nullptr || given != nullptr;
  if (in_parts && (!probes || call->max_norm >= 0.0 || call->skip_nonfinite || call->found_inf)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "optim_step: expected a rule that steps by norms, and neither clipping nor "
                     "skipping, where the step is made in parts");
  }
  OptimJob job{*call};
  bool runs = false;
  status = begin_step(job, probes, parallel, &runs);
  if (status != TT_OK || !runs) return status;
  make_shared(job);
  if (probes && given == nullptr) probe(job, parallel, found ? found : job.squares);
  if (found) return TT_OK;
  if (probes) adapt(job, given ? given : job.squares);
  update(job, parallel);
  count_steps(job);
  return TT_OK;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_optim_step(const tt_optim_call* call, const tt_parallel* parallel) {
  return run_step(call, nullptr, nullptr, parallel);
}

tt_status tt_optim_squares(const tt_optim_call* call, double* squares,
                           const tt_parallel* parallel) {
  if (squares == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "optim_squares: squares is NULL");
  }
  return run_step(call, squares, nullptr, parallel);
}

tt_status tt_optim_step_by(const tt_optim_call* call, const double* squares,
                           const tt_parallel* parallel) {
  if (squares == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "optim_step_by: squares is NULL");
  }
  return run_step(call, nullptr, squares, parallel);
}
