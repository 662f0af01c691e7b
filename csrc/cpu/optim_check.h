// What is checked of a step's call before anything of it is made, on every device.
#pragma once
#include <trimtab/adafactor.h>

namespace trimtab {

// What a rule asks of a tensor.
struct OptimNeeds {
  bool step, product;
  int states;
  bool coded;  // its states may be 8-bit codes
};
tt_status check_shape(const tt_optim_call& call, const char* op);
tt_status check_tensor(const tt_optim_call& call, const char* op, int64_t i,
                       const OptimNeeds& needs);
// Of adafactor: all that needs no look at the tensors' own numbers.
tt_status check_adafactor(const tt_adafactor_call& call);

namespace {

// needs_of(tensor, group) -> OptimNeeds
template <class NeedsOf>
tt_status check_call(const tt_optim_call& call, const char* op, NeedsOf&& needs_of) {
  tt_status status = check_shape(call, op);
  for (int64_t i = 0; status == TT_OK && i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad) status = check_tensor(call, op, i, needs_of(t, call.groups[t.group]));
  }
  return status;
}

}  // namespace
}  // namespace trimtab
