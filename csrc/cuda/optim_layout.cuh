// What launchers of an optimizer step share: further checks, alignments, sizes, and what a call's options are to the
// kernels.
#pragma once
#include "cpu/optim_check.h"
#include "cuda/launch.cuh"
#include "cuda/optim_table.cuh"

namespace trimtab {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline tt_status check_lengths(const tt_optim_call& call, const char* op) {
  for (int64_t i = 0; i < call.n_tensors; ++i)
    if (call.tensors[i].grad && call.tensors[i].numel >= int64_t{1} << 40)
      return set_error(TT_INVALID_ARGUMENT, "%s: tensor %lld: expected 0 <= numel < 2^40", op,
                       (long long)i);
  return TT_OK;
}

inline int bytes_of(int dtype) { return dtype == TT_F32 ? 4 : dtype == TT_DYNAMIC8 ? 1 : 2; }

// The least number of elements by which every array has to be extended to the left to begin at a multiple of
// 16 bytes, or of 8 codes; -1: no number does, or scales begin elsewhere.
inline int common_shift(const tt_optim_tensor& t, int states) {
  const auto fits = [](const void* p, int size, int shift) {
    const uintptr_t to = size == 1 ? 8 : 16;
    return p == nullptr || (reinterpret_cast<uintptr_t>(p) - uintptr_t(shift * size)) % to == 0;
  };
  for (int shift = 0; shift < (t.state_dtype == TT_DYNAMIC8 ? 1 : kEight); ++shift) {
    bool all = fits(t.param, bytes_of(t.param_dtype), shift) &&
               fits(t.grad, bytes_of(t.grad_dtype), shift) && fits(t.ema, 4, shift) &&
               fits(t.copy, t.copy ? bytes_of(t.copy_dtype) : 4, shift) &&
               fits(t.master_kind != TT_MASTER_NONE ? t.master : nullptr, 2, shift);
    for (int k = 0; k < states; ++k) all = all && fits(t.state[k], bytes_of(t.state_dtype), shift);
    if (all) return shift;
  }
  return -1;
}

// A tile more where the tensor is extended to the left.
inline int64_t tiles_of(const tt_optim_tensor& t) {
  return t.grad == nullptr || t.numel == 0 ? 0 : ceil_div(t.numel + kEight - 1, kTile);
}

// Four blocks run on a multiprocessor at once. Pieces for eight rounds of them balance well; 32 tiles take so long
// that starting a block costs nothing.
inline int64_t tiles_of_a_piece(int64_t tiles, int sm_count) {
  const int64_t share = tiles / (int64_t{sm_count} * 32);
  return share < 1 ? 1 : share > 32 ? 32 : share;
}

inline bool is_compact(const tt_optim_call& call) {
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad && (t.state_dtype == TT_DYNAMIC8 || t.master_kind != TT_MASTER_NONE)) return true;
  }
  return call.stochastic != 0;
}

template <class T>
T* at_byte(const void* base, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(const_cast<void*>(base)) + offset);
}

// As csrc/cpu/optim_step.cpp finds it: what stacking the norms of all gradients would give.
inline int clip_dtype(const tt_optim_call& call) {
  int dtype = -1;
  for (int64_t i = 0; call.round_clipped && i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad == nullptr || t.grad_dtype == dtype) continue;
    dtype = dtype < 0 ? t.grad_dtype : int(TT_F32);
  }
  return dtype;
}

// What does not depend on where tables and workspace lie.
inline OptimParams call_params(const tt_optim_call& call) {
  OptimParams p = {};
  p.seed = call.seed;
  p.stochastic = call.stochastic != 0;
  p.clip_dtype = clip_dtype(call);
  p.n_rows = call.n_tensors;
  p.rule = call.rule;
  p.zero_grad = call.zero_grad;
  p.skip_nonfinite = call.skip_nonfinite;
  p.grad_scale = call.grad_scale;
  p.found_inf = call.found_inf;
  p.norm = call.norm;
  p.skipped = call.skipped;
  p.given_norm = call.given_norm;
  p.max_norm = call.max_norm;
  p.ema_rest = float(1.0 - call.ema_decay);
  p.wants_norm = call.max_norm >= 0.0 || call.skip_nonfinite || call.norm != nullptr;
  p.sums_squares = p.wants_norm && (call.given_norm == nullptr || call.skip_nonfinite);
  return p;
}

}  // namespace
}  // namespace trimtab
