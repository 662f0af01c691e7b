// What comes before the update of optim_step on CUDA: the partial sums of the norm, where one is asked for;
// then a thread a tensor makes its constants from the step count on the device, and counts the step.
// With a probe after them (LAMB) both are one launch, and the probe adds up the norm and counts the step.
#pragma once
#include "cuda/optim_elements.cuh"
#include "cuda/optim_memory.cuh"

namespace trimtab {
namespace {

constexpr int kNormThreads = 128;
constexpr int kPrepareThreads = kNormSums;

// --- partial sums of squares: a warp a block of kNormBlock elements

TT_DEVICE float norm_element(const OptimRow& row, int64_t at) {
  const float x = load_one(row.grad, row.grad_dtype, at);
  return row.mask == nullptr || load_global(on_global(row.mask + at)) != 0 ? x : 0.0f;
}

// The lanes' sums in order, in double.
TT_DEVICE double lanes_in_order(float lane_sum) {
  double total = 0.0;
#pragma unroll 1
  for (int lane = 0; lane < 32; ++lane) total += double(__shfl_sync(kAllLanes, lane_sum, lane));
  return total;
}

// Element i of the block goes into lane i % 32, as csrc/cpu/optim_lanes.h adds.
TT_DEVICE void norm_blocks(const OptimParams& params) {
  constexpr int kAhead = 8;  // loads under way
  const int lane = threadIdx.x % 32;
  const int64_t block = int64_t{blockIdx.x} * (kNormThreads / 32) + threadIdx.x / 32;
  if (block >= params.n_blocks) return;
  const OptimPiece piece = load_global(params.table.blocks + block);
  const OptimRow row = load_global(params.table.rows + piece.row);
  const int64_t begin = int64_t{piece.at} * kNormBlock, end = ::min(begin + kNormBlock, row.numel);
  F32x1 sum = 0.0f;
#pragma unroll 1
  for (int64_t at = begin + lane; at < end; at += 32 * kAhead) {
    float x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      x[k] = at + 32 * k < end ? norm_element(row, at + 32 * k) : 0.0f;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum = fma(F32x1(x[k]), F32x1(x[k]), sum);
  }
  double total = lanes_in_order(sum.v);
  if (float_bits(float(total)) >=
      0x7f800000u) {  // too large for fp32, or no number: once more in double
    total = 0.0;
#pragma unroll 1
    for (int64_t at = begin; at < end; ++at) {
      const double x = norm_element(row, at);
      total += x * x;
    }
  }
  if (lane == 0) store_global(params.sums + block, total);
}

// --- constants

template <class Constants>
TT_DEVICE void store_floats(float* to, const Constants& constants) {
  store_global(on_global(reinterpret_cast<Constants*>(to)), constants);
}

TT_DEVICE void store_constants(int rule, const tt_optim_group& group, const RuleStep& at,
                               float* to) {
  switch (rule) {
    case TT_SGD: return store_floats(to, sgd_constants(group, at));
    case TT_ADAM: return store_floats(to, adam_constants(group, at));
    case TT_ADAGRAD: return store_floats(to, adagrad_constants(group, at));
    case TT_RMSPROP: return store_floats(to, rmsprop_constants(group, at));
    case TT_NADAM: return store_floats(to, nadam_constants(group, at));
    case TT_RADAM: return store_floats(to, radam_constants(group, at));
    case TT_ADAMAX: return store_floats(to, adamax_constants(group, at));
    case TT_LAMB: return store_floats(to, lamb_constants(group, at));
    default: return store_floats(to, lion_constants(group, at));
  }
}

// The sum of all partial sums, in every thread of the block of kThreads.
template <int kThreads>
TT_DEVICE double all_sums(const OptimParams& params) {
  constexpr int kEach = kNormSums / kThreads;  // running sums of a thread
  double* sums = reinterpret_cast<double*>(shared_memory());
  double mine[kEach] = {};
  for (int64_t k = threadIdx.x; k < params.n_blocks; k += kNormSums) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (k + i * kThreads < params.n_blocks)
        mine[i] += load_global(params.sums + k + i * kThreads);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) sums[threadIdx.x + i * kThreads] = mine[i];
  __syncthreads();
#pragma unroll 1
  for (unsigned half = kNormSums / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// All partial sums of a tensor, in the order of math/norm.h, in lane 0.
TT_DEVICE double warp_sum(const double* partial, int64_t n) {
  constexpr int kEach = kNormSums / 32;
  const int lane = threadIdx.x % 32;
  double sums[kEach] = {};
#pragma unroll 1
  for (int64_t k = lane; k < n; k += kNormSums) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (k + 32 * i < n) sums[i] += load_global(on_global(partial + k + 32 * i));
  }
#pragma unroll
  for (int half = kEach / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  double sum = sums[0];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum;
}

// The coefficient as clip_grad_norm_ computes it in that dtype (csrc/cpu/optim_step.cpp).
TT_DEVICE float rounded_clip(int dtype, double norm, double max_norm) {
  const F32x1 sum = F32x1(rounded(dtype, float(norm))) + F32x1(1e-6f);
  const F32x1 inverse = rounded(dtype, (F32x1(1.0f) / F32x1(rounded(dtype, sum.v))).v);
  const float factor = rounded(dtype, (inverse * F32x1(float(max_norm))).v);
  return factor >= 1.0f ? 1.0f : factor;  // NaN goes through, as there
}

// Scale, clip coefficient and whether to skip; the first block also tells the caller.
template <int kThreads>
TT_DEVICE OptimFacts find_facts(const OptimParams& params) {
  const bool speaks = blockIdx.x == 0 && threadIdx.x == 0;
  OptimFacts facts = {1.0f, 1.0f, 0, 0};
  if (params.grad_scale != nullptr) facts.scale = load_global(params.grad_scale);
  if (params.found_inf != nullptr) facts.skip = load_global(params.found_inf) != 0.0f;
  if (params.wants_norm) {
    double norm = params.given_norm != nullptr ? double(load_global(params.given_norm)) : 0.0;
    bool finite = true;
    if (params.sums_squares) {
      const double found = ::sqrt(all_sums<kThreads>(params)) / double(facts.scale);
      finite = !params.skip_nonfinite || found - found == 0.0;
      if (params.given_norm == nullptr || !finite) norm = found;
    }
    if (speaks && !facts.skip && params.norm != nullptr) store_global(params.norm, float(norm));
    if (!finite) facts.skip = 1;
    const double factor = params.max_norm / (norm + 1e-6);
    if (params.max_norm >= 0.0 && params.clip_dtype >= 0) {
      facts.clip = rounded_clip(params.clip_dtype, norm, params.max_norm);
    } else if (params.max_norm >= 0.0 && !(factor >= 1.0)) {
      facts.clip = float(factor);
    }
  }
  if (speaks) {
    store_global(params.facts, facts);
    if (facts.skip && params.skipped != nullptr)
      store_global(params.skipped, load_global(params.skipped) + 1);
  }
  return facts;
}

TT_DEVICE float next_step(const OptimRow& row) {
  return row.step != nullptr ? load_global(on_global(row.step)) + 1.0f : 1.0f;
}

// Of tensor `at`; returns what NAdam's product becomes.
TT_DEVICE float make_constants(const OptimParams& params, const OptimRow& row, int64_t at,
                               float step) {
  tt_optim_group group = load_global(params.table.groups + row.group);
  if (group.lr_tensor != nullptr) group.lr = double(load_global(on_global(group.lr_tensor)));
  float product = row.product != nullptr ? load_global(on_global(row.product)) : 1.0f;
  float* const constants = params.constants + at * kConstantFloats;
  const int dtype = arithmetic_dtype(row.param_dtype, row.master_kind);
  store_constants(params.rule, group, {double(step), &product, tt_dtype(dtype)}, constants);
  store_global(on_global(constants + kThreshold), float(group.lr * group.l1));
  if (params.stochastic) {
    RandomKey* keys = reinterpret_cast<RandomKey*>(constants + kKeys);
#pragma unroll 1
    for (int stream = 0; stream <= row.states; ++stream)
      store_global(on_global(keys + stream),
                   random_key(params.seed, uint64_t(step), uint64_t(at), uint64_t(stream)));
  }
  if (params.counts != nullptr) store_global(params.counts + at, 0u);
  return product;
}

}  // namespace
}  // namespace trimtab
