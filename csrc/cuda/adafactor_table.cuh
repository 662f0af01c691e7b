// What adafactor's kernels read beside optim_step's table: shapes, and lists of what blocks of threads take.
#pragma once
#include <trimtab/adafactor.h>

#include "cuda/optim_compact.cuh"
#include "cuda/optim_prepare.cuh"
#include "math/adafactor.h"

namespace trimtab {
namespace {

constexpr int kRowBlock = 512;  // columns of a row whose squares are added in fp32
constexpr int kSquareValues = 8192;  // gradients that lie in shared memory at once
constexpr int kSquareThreads = 128, kAverageThreads = 256;
constexpr int kSquareShared = (kSquareValues + kRowBlock) * int(sizeof(float));
constexpr int kAverageShared = int(kMeanRows) * int(sizeof(double));
static_assert(kAverageThreads == kNormSums && kAverageThreads == 32 * kColumnChains, "");
static_assert(kTileColumns % kRowBlock == 0, "");

// One tensor, and where its numbers begin in the workspace's arrays.
struct AdafactorShape {
  int64_t batch, rows, columns;  // batch 0: a vector
  int64_t whole_rows, whole_columns, whole_numel;
  int64_t row_tiles;  // of a matrix
  int64_t row_blocks;  // of kRowBlock columns
  int64_t tiles;  // row tiles of one row block that a block of threads takes at once
  int64_t mean_parts;  // of a matrix: one for each kMeanRows rows
  int64_t matrices;  // that a block of threads takes at once, where mean_parts is 1
  int64_t row_parts, column_parts, row_factor, column_factor, means;
  int64_t sums;  // in tt_adafactor_call::sums
};

struct AdafactorParams {
  OptimParams step;
  const tt_adafactor_group* groups;
  const AdafactorShape* shapes;
  const OptimPiece *squares, *rows, *columns;  // lists of pieces; those of the update are step's
  int64_t n_rows_pieces, n_columns_pieces;
  double* row_parts;  // of a tensor [row_blocks, batch * rows]
  float* column_parts;  // [row_tiles, batch * columns]
  float *row_factor,
      *column_factor;  // [batch * rows], [batch * columns]; row_factor first holds row_var
  double* means;  // [batch, mean_parts] sums of row_var
  double* sums;  // tt_adafactor_call::sums
  int32_t part;
};

// A tensor's constants as they lie in the workspace.
struct AdafactorFacts {
  AdafactorConstants constants;
  double lr;
  float step;
};
static_assert(sizeof(AdafactorFacts) <= kThreshold * sizeof(float), "");

using GradFacts = TensorFacts<AdafactorConstants>;

TT_DEVICE float* constants_of(const AdafactorParams& params, int64_t row) {
  return params.step.constants + row * kConstantFloats;
}
TT_DEVICE AdafactorFacts facts_of(const AdafactorParams& params, int64_t row) {
  return load_global(on_global(reinterpret_cast<const AdafactorFacts*>(constants_of(params, row))));
}

TT_DEVICE GradFacts grad_facts(const AdafactorParams& params, const OptimFacts& facts,
                               const OptimRow& row, const AdafactorConstants& constants) {
  return {constants,
          facts.scale,
          facts.clip,
          0.0f,
          params.step.ema_rest,
          params.step.zero_grad != 0,
          params.step.clip_dtype >= 0 && row.grad_dtype != TT_F32};
}

// The numbers of a tensor among the call's sums, as tt_adafactor_call has them.
TT_DEVICE double* sums_of(const AdafactorParams& params, const AdafactorShape& s) {
  return params.sums + s.sums;
}
TT_DEVICE double* mean_sums(const AdafactorParams& params, const AdafactorShape& s) {
  return sums_of(params, s) + 2;
}
TT_DEVICE double* row_sums(const AdafactorParams& params, const AdafactorShape& s) {
  return mean_sums(params, s) + s.batch;
}
TT_DEVICE double* column_sums(const AdafactorParams& params, const AdafactorShape& s) {
  return row_sums(params, s) + s.batch * s.rows;
}

TT_DEVICE float rate_of(const AdafactorParams& params, const OptimRow& row, const AdafactorShape& s,
                        const AdafactorFacts& f, double param_square, double direction_square) {
  const tt_adafactor_group own = load_global(params.groups + row.group);
  return adafactor_rate(f.lr, own.eps2, own.d, double(f.step), double(s.whole_numel), param_square,
                        direction_square);
}

// An element of a state moves towards `end` and is stored; returns what it then is.
TT_DEVICE float move_state(const CompactRow& c, int k, int64_t at, float x, float end,
                           const Lerp& average, bool keep) {
  const float moved = keep ? lerp(F32x1(x), F32x1(end), average).v : 0.0f;
  if (c.rounds_states()) {
    const uint16_t bits = to_bf16_bits(moved, c.rounding(1 + k), at);
    store_global(on_global(static_cast<uint16_t*>(c.row.state[k]) + at), bits);
    return to_float(bf16{bits});
  }
  store_one(c.row.state[k], c.row.state_dtype, at, moved);
  return rounded(c.row.state_dtype, moved);
}

// --- before all: whether there is a step, constants, step counts

__global__ void __launch_bounds__(kNormThreads, 8)
    adafactor_norm(const __grid_constant__ OptimParams params) {
  norm_blocks(params);
}

__global__ void __launch_bounds__(kPrepareThreads, 1)
    adafactor_prepare(const __grid_constant__ AdafactorParams params) {
  const OptimParams& step = params.step;
  const OptimFacts facts = find_facts<kPrepareThreads>(step);
  const int64_t at = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x;
  if (at >= step.n_rows || facts.skip) return;
  const OptimRow row = load_global(step.table.rows + at);
  if (row.grad == nullptr) return;
  tt_optim_group group = load_global(step.table.groups + row.group);
  const tt_adafactor_group own = load_global(params.groups + row.group);
  if (group.lr_tensor != nullptr) group.lr = double(load_global(on_global(group.lr_tensor)));
  const float count = next_step(row);
  const double weight = power_of_count(double(count), own.beta2_decay);
  float* const to = constants_of(params, at);
  const AdafactorFacts found = {adafactor_constants(group, own.eps1, weight), group.lr, count};
  store_global(on_global(reinterpret_cast<AdafactorFacts*>(to)), found);
  store_global(on_global(to + kThreshold), float(group.lr * group.l1));
  RandomKey* const keys = reinterpret_cast<RandomKey*>(to + kKeys);
#pragma unroll 1
  for (int stream = 0; stream < 3; ++stream)  // the parameter, two states
    store_global(on_global(keys + stream),
                 random_key(step.seed, uint64_t(count), uint64_t(at), uint64_t(stream)));
  store_global(step.counts + at, 0u);
  store_global(on_global(row.step), count);
}

}  // namespace
}  // namespace trimtab
