// What optim_step's kernels read: the table, made on the host once for many steps, and the workspace.
#pragma once
#include <trimtab/optim_step.h>

#include "cuda/ptx.cuh"
#include "math/norm.h"

namespace trimtab {
namespace {

constexpr int kUpdateThreads = 128;
constexpr int kEight = 8;  // elements of a thread at a time: 16 bytes of bf16, 32 of fp32
constexpr int64_t kTile = kUpdateThreads * kEight;
constexpr int kConstantFloats = 20;  // room for the constants of any rule, then the threshold
constexpr int kThreshold = kConstantFloats - 1;

// One tensor.
struct OptimRow {
  void *param, *grad;
  void* state[TT_OPTIM_STATES];
  float* ema;
  void* copy;
  uint8_t* mask;
  float *step, *product;
  int64_t numel, body;  // elements; of them those before torch's tail
  int32_t group;
  uint8_t param_dtype, grad_dtype, state_dtype, copy_dtype;
  uint8_t variant, tail, states;
  // Element -shift lies at a multiple of 16 bytes in every array: tiles are counted from there.
  uint8_t shift;
  bool wide;  // there is such a shift
  bool negate, fresh;
};

struct OptimPiece {
  int32_t row;
  int32_t at;  // first tile, or number of the block of kNormBlock elements
};

// The table: these arrays, each at a multiple of 64 bytes.
struct OptimTable {
  OptimRow* rows;
  tt_optim_group* groups;
  OptimPiece *pieces, *blocks;
};

// What one step finds out before the update. The workspace: this, the constants of every tensor, the sums.
struct OptimFacts {
  float scale, clip;
  int32_t skip, reserved;
};

struct OptimParams {
  OptimTable table;
  OptimFacts* facts;
  float* constants;  // [rows, kConstantFloats]
  double* sums;  // [n_blocks]
  int64_t n_rows, n_blocks;
  int32_t rule, tiles;  // tiles of a piece
  int32_t zero_grad, skip_nonfinite;
  const float *grad_scale, *found_inf, *given_norm;
  float* norm;
  int64_t* skipped;
  double max_norm;
  float ema_rest;  // 1 - ema_decay
  bool wants_norm, sums_squares;  // a norm is needed; it is to be computed, or looked at
};

TT_DEVICE int dtype_bytes(int dtype) { return dtype == TT_F32 ? 4 : 2; }

}  // namespace
}  // namespace trimtab
