// What every optimizer step does before its update: checks, tables, the norm of the gradients, and whether there
// is a step at all.
#include "cpu/optim_job.h"

#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/optim_window.h"
#include "cpu/scratch.h"
#include "cpu/status.h"
#include "math/optim_rule.h"

namespace trimtab {

namespace {

// Carves the job's arrays out of this thread's scratch memory; false if there is none.
bool reserve(OptimJob& job, bool with_directions) {
  const tt_optim_call& call = job.call;
  const int64_t n = call.n_tensors;
  int64_t blocks = 0;
  for (int64_t i = 0; i < n; ++i)
    if (call.tensors[i].grad) blocks += call.tensors[i].numel / kOptimNormBlock + 1;
  const auto cut = [&](Carver& carve) {
    carve(job.offset, n + 1);
    carve(job.block, n + 1);
    carve(job.sums, blocks);
    carve(job.direction_sums, with_directions ? blocks : 0);
    carve(job.squares, with_directions ? 2 * n : 0);
    carve(job.shared_of, n);
    carve(job.latest, call.n_groups);
    carve(job.shared, n);
  };
  Carver memory;
  cut(memory);
  if (!memory.take(Scratch::kOptim)) return false;
  cut(memory);
  job.offset[0] = job.block[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t numel = call.tensors[i].grad ? call.tensors[i].numel : 0;
    job.offset[i + 1] = job.offset[i] + numel;
    job.block[i + 1] = job.block[i] + (numel + kOptimNormBlock - 1) / kOptimNormBlock;
  }
  job.total = job.offset[n];
  return true;
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

}  // namespace

tt_status begin_step(OptimJob& job, bool with_directions, const tt_parallel* parallel, bool* runs) {
  const tt_optim_call& call = job.call;
  tt_isa isa;
  tt_status status = current_isa(&isa);
  if (status != TT_OK) return status;
  job.kernels = isa >= TT_ISA_AVX512   ? optim_kernels_avx512()
                : isa == TT_ISA_SCALAR ? optim_kernels_scalar()
                                       : optim_kernels_avx2();
  status = optim_memory_kernels(&job.memory);
  if (status != TT_OK) return status;
  if (!reserve(job, with_directions)) {
    return set_error(TT_OUT_OF_MEMORY, "optim_step: no memory for the tables");
  }
  const bool overflowed = call.found_inf && *call.found_inf != 0.0f;
  *runs = !overflowed && clip(job, parallel);
  if (!*runs) skip(job, parallel);
  return TT_OK;
}

}  // namespace trimtab
