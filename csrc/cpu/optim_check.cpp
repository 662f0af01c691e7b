#include "cpu/optim_check.h"

#include "cpu/status.h"

namespace trimtab {
namespace {

bool is_dtype(int dtype) { return dtype == TT_F32 || dtype == TT_BF16 || dtype == TT_F16; }

// What is wrong with a tensor that is stepped; NULL: nothing.
const char* fault(const tt_optim_call& call, const tt_optim_tensor& t, const OptimNeeds& needs) {
  const bool coded = needs.coded && t.state_dtype == TT_DYNAMIC8;
  if (t.numel < 0) return "numel >= 0";
  if (!is_dtype(t.param_dtype) || !is_dtype(t.grad_dtype) || (!is_dtype(t.state_dtype) && !coded) ||
      (t.copy && !is_dtype(t.copy_dtype))) {
    return "float32, bfloat16 or float16";
  }
  if (t.master_kind < 0 || t.master_kind > TT_MASTER_REMAINDER) return "a tt_master";
  if (t.master_kind != TT_MASTER_NONE && t.param_dtype != TT_BF16) {
    return "bfloat16 where there is a master";
  }
  if (t.master_kind != TT_MASTER_NONE && t.master == nullptr && t.numel > 0) {
    return "master, got NULL";
  }
  if (t.param == nullptr && t.numel > 0) return "param, got NULL";
  if ((needs.step || call.stochastic) && t.step == nullptr) return "step, got NULL";
  if (needs.product && t.product == nullptr) return "product, got NULL";
  for (int k = 0; k < needs.states; ++k)
    if (t.numel > 0 && (t.state[k] == nullptr || (coded && t.scale[k] == nullptr)))
      return "all of the rule's states, got NULL";
  return nullptr;
}

}  // namespace

tt_status check_shape(const tt_optim_call& call, const char* op) {
  if (call.n_tensors < 0 || call.n_groups < 0 || (call.n_tensors > 0 && !call.tensors) ||
      (call.n_groups > 0 && !call.groups)) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected tensors and groups", op);
  }
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad == nullptr || (t.group >= 0 && t.group < call.n_groups)) continue;
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: tensor %lld: expected group to be an index into groups", op,
                     (long long)i);
  }
  return TT_OK;
}

tt_status check_tensor(const tt_optim_call& call, const char* op, int64_t i,
                       const OptimNeeds& needs) {
  const char* what = fault(call, call.tensors[i], needs);
  if (what == nullptr) return TT_OK;
  return set_error(TT_INVALID_ARGUMENT, "%s: tensor %lld: expected %s", op, (long long)i, what);
}

namespace {

tt_status check_shapes(const tt_adafactor_call& call) {
  const tt_optim_call& step = *call.step;
  const auto bad = [](int64_t i, const char* what) {
    return set_error(TT_INVALID_ARGUMENT, "adafactor: tensor %lld: expected %s", (long long)i,
                     what);
  };
  for (int64_t i = 0; i < step.n_tensors; ++i) {
    const tt_optim_tensor& t = step.tensors[i];
    if (t.grad == nullptr) continue;
    const tt_adafactor_shape& shape = call.shapes[i];
    if (shape.batch < 0 || shape.rows < 0 || shape.columns < 0) return bad(i, "a shape");
    if (shape.batch && shape.batch * shape.rows * shape.columns != t.numel)
      return bad(i, "batch * rows * columns to be numel");
    if (shape.whole_rows < shape.rows || shape.whole_columns < shape.columns ||
        shape.whole_numel < t.numel)
      return bad(i, "a whole that is no smaller than its piece");
    const int states = shape.batch ? 2 : 1;
    const tt_status status = check_tensor(step, "adafactor", i, {true, false, states, false});
    if (status != TT_OK) return status;
  }
  return TT_OK;
}

}  // namespace

tt_status check_adafactor(const tt_adafactor_call& call) {
  tt_status status = check_shape(*call.step, "adafactor");
  if (status != TT_OK) return status;
  const auto bad = [](const char* what) {
    return set_error(TT_INVALID_ARGUMENT, "adafactor: expected %s", what);
  };
  if ((call.step->n_groups > 0 && !call.groups) || (call.step->n_tensors > 0 && !call.shapes))
    return bad("groups and shapes");
  if (call.part < 0 || call.part > TT_ADAFACTOR_UPDATE) return bad("a tt_adafactor_part");
  if (call.part != TT_ADAFACTOR_WHOLE &&
      (call.sums == nullptr || call.step->max_norm >= 0.0 || call.step->skip_nonfinite))
    return bad("sums, and neither clipping nor skip_nonfinite, where the step is made in parts");
  return check_shapes(call);
}

}  // namespace trimtab
