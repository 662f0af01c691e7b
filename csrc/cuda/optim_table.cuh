// What optim_step's kernels read: the table, made on the host once for many steps, and the workspace.
#pragma once
#include <trimtab/optim_step.h>

#include "cuda/ptx.cuh"
#include "math/norm.h"
#include "math/stochastic_rounding.h"

// The tables of the 8-bit codes, without sign and with, lie at the start of a block's shared memory, where
// lanes that read different entries don't wait for each other.
#define TT_DYNAMIC_TABLE dynamic_tables()[kSigned]
namespace trimtab {
struct DynamicCode;
namespace {
TT_INLINE const DynamicCode* dynamic_tables() {
#if defined(__CUDA_ARCH__) || defined(TT_SIMT)
  return reinterpret_cast<const DynamicCode*>(shared_memory());
#else
  return nullptr;  // no host function asks
#endif
}
}  // namespace
}  // namespace trimtab
#include "math/dynamic_code.h"

namespace trimtab {
namespace {

constexpr int kUpdateThreads = 128;
constexpr int kEight = 8;  // elements of a thread at a time: 16 bytes of bf16, 32 of fp32
constexpr int64_t kTile = kUpdateThreads * kEight;
// Room for the constants of any rule; then the threshold, then the keys of the streams that are rounded
// stochastically: the parameter's and the states'.
constexpr int kConstantFloats = 32, kThreshold = 19, kKeys = 20;
static_assert(kKeys + 2 * (1 + TT_OPTIM_STATES) <= kConstantFloats, "");

// Tells the compiler what it cannot know of a pointer that comes from the table: without it a load is a
// generic one, which asks each time where the address lies.
template <class T>
TT_DEVICE T* on_global(T* p) {
#if !defined(TT_SIMT)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// One tensor.
struct OptimRow {
  void *param, *grad;
  void* state[TT_OPTIM_STATES];
  float* ema;
  void* copy;
  uint8_t* mask;
  float *step, *product;
  float* scale[TT_OPTIM_STATES];  // of 8-bit states
  uint16_t* master;
  int64_t first_block;  // number of the first of its blocks of kNormBlock elements, among all
  int64_t numel, body;  // elements; of them those before torch's tail
  int32_t group;
  uint8_t param_dtype, grad_dtype, state_dtype, copy_dtype;
  uint8_t variant, tail, states;
  // Element -shift lies at a multiple of 16 bytes in every array: tiles are counted from there.
  uint8_t shift;
  bool wide;  // there is such a shift
  bool negate;
  uint8_t master_kind, signs;  // tt_master; bit k: state k can be negative
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
  DynamicCode* codes;  // [2]
};

// What one step finds out before the update. The workspace: this, the constants of every tensor, the sums,
// and where a rule steps by the norms of a tensor two more arrays of sums and a count a tensor.
struct OptimFacts {
  float scale, clip;
  int32_t skip, reserved;
};

struct OptimParams {
  OptimTable table;
  OptimFacts* facts;
  float* constants;  // [rows, kConstantFloats]
  double *sums, *param_sums,
      *direction_sums;  // [n_blocks] of the gradients; of what a probe looks at
  double* squares;  // [rows][2] of a step in parts (optim_squares.h); NULL: it is whole
  uint32_t* counts;  // [rows] of blocks whose sums are there
  uint64_t seed;
  int64_t n_rows, n_blocks;
  int32_t rule, tiles;  // tiles of a piece
  int32_t zero_grad, skip_nonfinite;
  const float *grad_scale, *found_inf, *given_norm;
  float* norm;
  int64_t* skipped;
  double max_norm;
  float ema_rest;  // 1 - ema_decay
  int32_t clip_dtype;  // in which the clip coefficient is rounded; -1: it is not
  bool stochastic;
  bool wants_norm, sums_squares;  // a norm is needed; it is to be computed, or looked at
  bool probe_prepares;  // the probe is the first to know the norm
};

TT_DEVICE int dtype_bytes(int dtype) { return dtype == TT_F32 ? 4 : 2; }

// The dtype in which the rule computes: a remainder makes the parameter an fp32 one.
TT_INLINE int arithmetic_dtype(int param_dtype, int master_kind) {
  return master_kind == TT_MASTER_REMAINDER ? int(TT_F32) : param_dtype;
}

}  // namespace
}  // namespace trimtab
