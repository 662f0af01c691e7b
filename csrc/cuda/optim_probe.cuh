// LAMB on CUDA: before the update, the norm of each tensor and of the direction in which it would move.
// A warp takes kNormBlock elements at a time; the last one of a tensor to be done adds up and changes the
// constants. Where the gradients are clipped by their norm, this is the first to know it: then there are only
// as many blocks as run at once, and each adds up the partial sums for itself.
#pragma once
#include "cuda/optim_compact.cuh"
#include "cuda/optim_prepare.cuh"

namespace trimtab {
namespace {

constexpr int kProbeBlock =
    512;  // elements whose squares are added in fp32: kOptimBlock of csrc/cpu
using LambFamily = RuleFamily<Lamb, 1, 2>;
static_assert(kNormThreads == kUpdateThreads, "load_dynamic_tables is for as many");

struct ProbeElement {
  float param, direction;
};

TT_DEVICE ProbeElement probe_element(const CompactRow& c, const TensorFacts<LambConstants>& f,
                                     int64_t at) {
  const OptimRow& row = c.row;
  const float p = load_param_one(row, at);
  float g = load_one(row.grad, row.grad_dtype, at);
  if (prepares(row, f)) g = prepared(row, f, g);
  F32x1 direction = p, state[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) state[k] = load_state_one(c, k, at);
  Lamb<kLambProbe>::update(f.constants, direction, F32x1(g), state);
  const bool keep = row.mask == nullptr || load_global(on_global(row.mask + at)) != 0;
  return {p, keep ? direction.v : 0.0f};
}

// Squares of elements begin .. end - 1, at most kProbeBlock, in the order of csrc/cpu/optim_lanes.h.
TT_DEVICE void probe_block(const CompactRow& c, const TensorFacts<LambConstants>& f, int64_t begin,
                           int64_t end, double (&squares)[2]) {
  const int lane = threadIdx.x % 32;
  F32x1 sums[2] = {0.0f, 0.0f};
#pragma unroll 2
  for (int64_t at = begin + lane; at < end; at += 32) {
    const ProbeElement x = probe_element(c, f, at);
    sums[0] = fma(F32x1(x.param), F32x1(x.param), sums[0]);
    sums[1] = fma(F32x1(x.direction), F32x1(x.direction), sums[1]);
  }
  double totals[2];
  bool exact = true;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    totals[k] = lanes_in_order(sums[k].v);
    exact = exact && float_bits(float(totals[k])) < 0x7f800000u;
  }
  if (!exact) {  // too large for fp32, or no number: once more in double
    double again[2] = {0.0, 0.0};
#pragma unroll 1
    for (int64_t at = begin; at < end; at += 32) {
      ProbeElement x = {0.0f, 0.0f};
      if (at + lane < end) x = probe_element(c, f, at + lane);
#pragma unroll 1
      for (int i = 0; i < 32; ++i) {
        const double param = __shfl_sync(kAllLanes, x.param, i);
        const double direction = __shfl_sync(kAllLanes, x.direction, i);
        again[0] += param * param;
        again[1] += direction * direction;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (float_bits(float(totals[k])) >= 0x7f800000u) totals[k] = again[k];
  }
  squares[0] += totals[0];
  squares[1] += totals[1];
}

// One block of kNormBlock elements; to be called by a whole warp.
TT_DEVICE void probe(const OptimParams& params, const OptimFacts& facts, int64_t block) {
  const int lane = threadIdx.x % 32;
  const OptimPiece piece = load_global(params.table.blocks + block);
  const OptimRow row = load_global(params.table.rows + piece.row);
  float* const constants = params.constants + int64_t{piece.row} * kConstantFloats;
  const CompactRow compact = {row, constants, false};
  TensorFacts<LambConstants> f = {
      load_global(on_global(reinterpret_cast<const LambConstants*>(constants))),
      facts.scale,
      facts.clip,
      0.0f,
      0.0f,
      false,
      params.clip_dtype >= 0 && row.grad_dtype != TT_F32};
  const int64_t begin = int64_t{piece.at} * kNormBlock, end = ::min(begin + kNormBlock, row.numel);
  double squares[2] = {0.0, 0.0};
#pragma unroll 1
  for (int64_t at = begin; at < end; at += kProbeBlock)
    probe_block(compact, f, at, ::min(at + kProbeBlock, end), squares);

  // The sums before the count, the count before the others' sums.
  const int64_t blocks = (row.numel + kNormBlock - 1) / kNormBlock;
  uint32_t before = 0;
  if (lane == 0) {
    store_global(params.param_sums + block, squares[0]);
    store_global(params.direction_sums + block, squares[1]);
    __threadfence();
    before = atomicAdd(params.counts + piece.row, 1u);
  }
  if (__shfl_sync(kAllLanes, before, 0) != uint32_t(blocks - 1)) return;
  __threadfence();
  const double param = warp_sum(params.param_sums + row.first_block, blocks);
  const double direction = warp_sum(params.direction_sums + row.first_block, blocks);
  if (lane != 0) return;
  if (params.squares != nullptr) {
    store_global(params.squares + 2 * int64_t{piece.row}, param);
    store_global(params.squares + 2 * int64_t{piece.row} + 1, direction);
    return;
  }
  lamb_adapt(f.constants, ::sqrt(param), ::sqrt(direction));
  store_global(on_global(reinterpret_cast<LambConstants*>(constants)), f.constants);
}

// What optim_prepare does but for the constants.
TT_DEVICE OptimFacts prepare_here(const OptimParams& params) {
  const OptimFacts facts = find_facts<kNormThreads>(params);
  __syncthreads();  // the sums lie where the tables will
  if (facts.skip) return facts;
  const int64_t threads = int64_t{gridDim.x} * kNormThreads;
  for (int64_t at = int64_t{blockIdx.x} * kNormThreads + threadIdx.x; at < params.n_rows;
       at += threads) {
    const OptimRow row = load_global(params.table.rows + at);
    if (row.grad != nullptr && row.step != nullptr)
      store_global(on_global(row.step), next_step(row));
  }
  return facts;
}

// Of a step in parts: what the last warp of a tensor does otherwise.
__global__ void __launch_bounds__(kNormThreads, 4)
    optim_adapt(const __grid_constant__ OptimParams params) {
  const int64_t at = int64_t{blockIdx.x} * kNormThreads + threadIdx.x;
  if (at >= params.n_rows || load_global(&params.facts->skip)) return;
  if (load_global(&params.table.rows[at].grad) == nullptr) return;
  LambConstants* const to =
      on_global(reinterpret_cast<LambConstants*>(params.constants + at * kConstantFloats));
  LambConstants constants = load_global(to);
  lamb_adapt(constants, ::sqrt(load_global(params.squares + 2 * at)),
             ::sqrt(load_global(params.squares + 2 * at + 1)));
  store_global(to, constants);
}

__global__ void __launch_bounds__(kNormThreads, 4)
    optim_probe(const __grid_constant__ OptimParams params) {
  const OptimFacts facts = params.probe_prepares ? prepare_here(params) : load_global(params.facts);
  if (facts.skip) return;
  load_dynamic_tables(params.table.codes);
  const int64_t warps = int64_t{gridDim.x} * (kNormThreads / 32);
#pragma unroll 1
  for (int64_t block = int64_t{blockIdx.x} * (kNormThreads / 32) + threadIdx.x / 32;
       block < params.n_blocks; block += warps)
    probe(params, facts, block);
}

}  // namespace
}  // namespace trimtab
