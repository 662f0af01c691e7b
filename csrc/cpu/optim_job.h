// optim_step's call with all that is worked out before its passes, and the passes: all elements of all tensors
// as one line, cut into equal tasks.
#pragma once
#include <trimtab/optim_step.h>

#include <algorithm>

#include "cpu/optim_check.h"
#include "cpu/optim_kernels.h"
#include "cpu/optim_memory.h"
#include "cpu/parallel.h"

namespace trimtab {

// A task is big enough that starting it costs nothing, and small enough that threads end together.
constexpr int64_t kMinTask = 4 * kOptimNormBlock, kMaxTask = 16 * kOptimNormBlock;
// Elements; below, waking a thread costs what it saves. A norm takes an eighth of an update's time.
constexpr int64_t kWorthThreads = 32768, kNormWorthThreads = 8 * kWorthThreads;

// What all elements of a tensor share; tensors of one group and step count share it too.
struct OptimShared {
  float constants[kOptimConstants];
  // Of whole vectors of torch's, and of the rest; in fp32, and in the parameter's dtype.
  OptimUpdateFn update, tail, typed_update, typed_tail;
  OptimCodedFn coded;  // of 8-bit states; NULL: there is none
  OptimHalvesFn halves[TT_MASTER_REMAINDER + 1];  // by tt_master; NULL likewise
  OptimUpdateFn probe;  // NULL: the rule needs no norm of a tensor
  int states;
  float sign, threshold;  // of the gradient; of the shrinkage
  // what it was computed from, and NAdam's product after this step
  double step;
  float product_before, product;
  int fresh, dtype;
};

struct OptimJob {
  const tt_optim_call& call;
  OptimKernels kernels{};
  OptimMemoryKernels memory{};
  int64_t total = 0;  // elements
  int64_t* offset = nullptr;  // [n + 1] of each tensor's first element among all
  int64_t* block = nullptr;  // [n + 1] of its first partial sum
  double* sums = nullptr;  // [block[n]]
  double* direction_sums = nullptr;  // [block[n]], where the rule has a probe
  double* squares = nullptr;  // [n][2], where the rule has a probe
  int32_t* shared_of = nullptr;  // [n] index into shared
  int32_t* latest = nullptr;  // [groups] index of the last entry made for a group, -1: none
  OptimShared* shared = nullptr;
  float scale = 1.0f, clip = 1.0f;
};

// Kernels, tables, scale and clip of the job; runs: false if the step is skipped, which is then done.
tt_status begin_step(OptimJob& job, bool with_directions, const tt_parallel* parallel, bool* runs);

// The passes (optim_passes.cpp).
double sum_squares(OptimJob& job,
                   const tt_parallel* parallel);  // of all gradients as they are in memory
// LAMB: squares of the norm of each tensor and of its direction, [n_tensors][2]; and these into its constants.
void probe(OptimJob& job, const tt_parallel* parallel, double* squares);
void adapt(OptimJob& job, const double* squares);
void update(const OptimJob& job, const tt_parallel* parallel);

namespace {

// A remainder makes the parameter an fp32 one.
inline int arithmetic_dtype(const tt_optim_tensor& t) {
  return t.master_kind == TT_MASTER_REMAINDER ? int(TT_F32) : t.param_dtype;
}

// Runs body(i, begin, end), over elements [begin, end) of tensor i, for all tensors, in equal tasks.
// Cuts lie at multiples of kOptimNormBlock within a tensor.
template <class Body>
void for_pieces(const OptimJob& job, const tt_parallel* parallel, Body&& body) {
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

}  // namespace
}  // namespace trimtab
