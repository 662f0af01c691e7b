// The update of optim_step on CUDA: a block takes a piece of one tensor, tile by tile of 1024 elements. In a
// whole tile of an aligned tensor a thread takes eight adjacent elements, by 16 bytes; in others eight
// elements apart, one by one. Both do with an element what csrc/cpu does.
#pragma once
#include "cuda/optim_compact.cuh"
#include "cuda/optim_elements.cuh"
#include "cuda/optim_prepare.cuh"

namespace trimtab {
namespace {

// --- before it

__global__ void __launch_bounds__(kNormThreads, 8)
    optim_norm(const __grid_constant__ OptimParams params) {
  norm_blocks(params);
}

__global__ void __launch_bounds__(kPrepareThreads, 1)
    optim_prepare(const __grid_constant__ OptimParams params) {
  const OptimFacts facts = find_facts<kPrepareThreads>(params);
  const int64_t at = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x;
  if (at >= params.n_rows || facts.skip) return;
  const OptimRow row = load_global(params.table.rows + at);
  if (row.grad == nullptr) return;
  const float step = next_step(row), product = make_constants(params, row, at, step);
  if (row.step != nullptr) store_global(on_global(row.step), step);
  if (row.product != nullptr) store_global(on_global(row.product), product);
}

// Both at once, before a probe: it finds the facts and counts the step, so that nothing here waits for
// the norm

__global__ void __launch_bounds__(kNormThreads, 4)
    optim_norm_and_constants(const __grid_constant__ OptimParams params) {
  const int64_t norm_grid = (params.n_blocks + kNormThreads / 32 - 1) / (kNormThreads / 32);
  if (blockIdx.x < norm_grid) return norm_blocks(params);
  const int64_t at = (blockIdx.x - norm_grid) * kNormThreads + threadIdx.x;
  if (at >= params.n_rows) return;
  const OptimRow row = load_global(params.table.rows + at);
  if (row.grad != nullptr) make_constants(params, row, at, next_step(row));
}

// --- the update

// Eight adjacent elements, all there, all aligned.
template <class Family>
TT_DEVICE void step_eight(const OptimRow& row, const TensorFacts<typename Family::Constants>& f,
                          int64_t at) {
  RawChunk<float> raw_p = load_raw(row.param, row.param_dtype, at);
  RawChunk<float> raw_g = load_raw(row.grad, row.grad_dtype, at);
  RawChunk<float> raw_s[Family::kStates];
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    raw_s[k] = {};
    if (k < row.states) raw_s[k] = load_raw(row.state[k], row.state_dtype, at);
  }
  float p[kEight], g[kEight], s[Family::kStates][kEight];
  widen(raw_p, row.param_dtype, p);
  widen(raw_g, row.grad_dtype, g);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) widen(raw_s[k], row.state_dtype, s[k]);
  step_elements<Family>(row, f, row.variant, p, g, s);
  if (row.mask != nullptr) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const bool keep = load_global(on_global(row.mask + at + j)) != 0;
      p[j] = keep ? p[j] : 0.0f;
#pragma unroll
      for (int k = 0; k < Family::kStates; ++k) s[k][j] = keep ? s[k][j] : 0.0f;
    }
  }
  store_eight(row.param, row.param_dtype, at, p);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < row.states) store_eight(row.state[k], row.state_dtype, at, s[k]);
  if (row.copy != nullptr) store_eight(row.copy, row.copy_dtype, at, p);
  if (row.ema != nullptr) {
    float e[kEight];
    widen(load_raw(row.ema, TT_F32, at), TT_F32, e);
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      e[j] = averaged(e[j], rounded(row.param_dtype, p[j]), f.ema_rest);
    store_eight(row.ema, TT_F32, at, e);
  }
  if (f.zero_grad) {
    const float zero[kEight] = {};
    store_eight(row.grad, row.grad_dtype, at, zero);
  }
}

template <class Family>
TT_DEVICE void step_one(const OptimRow& row, const TensorFacts<typename Family::Constants>& f,
                        int64_t at) {
  float p[1] = {load_one(row.param, row.param_dtype, at)};
  float g[1] = {load_one(row.grad, row.grad_dtype, at)};
  float s[Family::kStates][1];
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    s[k][0] = 0.0f;
    if (k < row.states) s[k][0] = load_one(row.state[k], row.state_dtype, at);
  }
  step_elements<Family>(row, f, at < row.body ? row.variant : row.tail, p, g, s);
  const bool keep = row.mask == nullptr || load_global(on_global(row.mask + at)) != 0;
  p[0] = keep ? p[0] : 0.0f;
  store_one(row.param, row.param_dtype, at, p[0]);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < row.states) store_one(row.state[k], row.state_dtype, at, keep ? s[k][0] : 0.0f);
  if (row.copy != nullptr) store_one(row.copy, row.copy_dtype, at, p[0]);
  if (row.ema != nullptr)
    store_global(on_global(row.ema + at), averaged(load_global(on_global(row.ema + at)),
                                                   rounded(row.param_dtype, p[0]), f.ema_rest));
  if (f.zero_grad) store_one(row.grad, row.grad_dtype, at, 0.0f);
}

// A skipped step: the gradients alone.
TT_DEVICE void zero_gradient(const OptimRow& row, int64_t begin, int64_t end) {
  for (int64_t at = begin + threadIdx.x; at < end; at += kUpdateThreads)
    store_one(row.grad, row.grad_dtype, at, 0.0f);
}

template <class Constants>
TT_DEVICE TensorFacts<Constants> tensor_facts(const OptimParams& params, const OptimFacts& facts,
                                              const OptimRow& row, const float* constants) {
  return {load_global(on_global(reinterpret_cast<const Constants*>(constants))),
          facts.scale,
          facts.clip,
          load_global(on_global(constants + kThreshold)),
          params.ema_rest,
          params.zero_grad != 0,
          params.clip_dtype >= 0 && row.grad_dtype != TT_F32};
}

// kCompact: 8-bit states, masters or stochastic rounding may occur.
template <class Family, bool kCompact>
__global__ void __launch_bounds__(kUpdateThreads, kCompact ? 3 : 4)
    optim_update(const __grid_constant__ OptimParams params) {
  const OptimPiece piece = load_global(params.table.pieces + blockIdx.x);
  const OptimRow row = load_global(params.table.rows + piece.row);
  const OptimFacts facts = load_global(params.facts);
  const int64_t first = int64_t{piece.at} * kTile - row.shift;
  const int64_t last = ::min(first + int64_t{params.tiles} * kTile, row.numel);
  if (facts.skip) {
    if (params.zero_grad) zero_gradient(row, ::max(first, int64_t{0}), last);
    return;
  }
  using Constants = typename Family::Constants;
  const float* constants = params.constants + int64_t{piece.row} * kConstantFloats;
  const TensorFacts<Constants> f = tensor_facts<Constants>(params, facts, row, constants);
  if (kCompact) load_dynamic_tables(params.table.codes);
#pragma unroll 1
  for (int64_t tile = first; tile < last; tile += kTile) {
    const bool whole = row.wide && tile >= 0 && tile + kTile <= row.body;
    if constexpr (kCompact) {
      const CompactRow compact = {row, constants, params.stochastic};
      if (whole) {
        compact_eight<Family>(compact, f, tile + int64_t{threadIdx.x} * kEight);
      } else {
        compact_block<Family>(compact, f, tile, last);
      }
      continue;
    }
    if (whole) {
      step_eight<Family>(row, f, tile + int64_t{threadIdx.x} * kEight);
      continue;
    }
#pragma unroll 1
    for (int64_t at = tile + threadIdx.x; at < ::min(tile + kTile, last); at += kUpdateThreads)
      if (at >= 0) step_one<Family>(row, f, at);
  }
}

}  // namespace
}  // namespace trimtab
