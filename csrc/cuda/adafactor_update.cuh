// Adafactor's direction and update on CUDA: over the elements as they lie in memory, whatever the matrices.
#pragma once
#include "cuda/adafactor_average.cuh"

namespace trimtab {
namespace {

// Where an element of a matrix finds its factors.
struct FactorPlace {
  int64_t row;  // among all
  int64_t row_of_matrix, column, columns;  // columns: the first factor of the matrix's columns
};

TT_DEVICE FactorPlace place_of(const AdafactorShape& s, int64_t at) {
  FactorPlace p;
  p.row = at / s.columns;
  p.column = at - p.row * s.columns;
  const int64_t matrix = s.batch > 1 ? p.row / s.rows : 0;
  p.row_of_matrix = p.row - matrix * s.rows;
  p.columns = matrix * s.columns;
  return p;
}

// rows * columns + column elements further.
TT_DEVICE void advance(const AdafactorShape& s, int64_t rows, int64_t column, FactorPlace* p) {
  p->column += column;
  if (p->column >= s.columns) p->column -= s.columns, ++rows;
  p->row += rows;
  p->row_of_matrix += rows;
  while (p->row_of_matrix >= s.rows) p->row_of_matrix -= s.rows, p->columns += s.columns;
}

struct FactorArrays {
  const float *row, *column;
};

TT_DEVICE FactorArrays factors_of(const AdafactorParams& params, const AdafactorShape& s) {
  return {params.row_factor + s.row_factor, params.column_factor + s.column_factor};
}

TT_DEVICE float direction_at(const FactorArrays& factors, const FactorPlace& p, float g,
                             float limit) {
  return adafactor_direction(F32x1(g), F32x1(load_global(factors.row + p.row)),
                             F32x1(load_global(factors.column + p.columns + p.column)),
                             F32x1(limit))
      .v;
}

// --- the norms of parameter and direction: a warp kNormBlock elements; the last one of a tensor adds up

constexpr int kDirectionBlock = 512;  // elements whose squares are added in fp32

struct DirectionRow {
  const AdafactorParams& params;
  const CompactRow& c;
  const AdafactorShape& s;
  const GradFacts& f;
};

// Squares of elements begin .. end - 1; of a vector the state moves first.
template <bool kMatrix>
TT_DEVICE void direction_block(const DirectionRow& d, int64_t begin, int64_t end,
                               double (&squares)[2]) {
  constexpr int kAhead = 4;  // loads under way
  const OptimRow& row = d.c.row;
  const int64_t first = begin + threadIdx.x % 32;
  const FactorArrays factors = factors_of(d.params, d.s);
  const Lerp average = lerp_constants(d.f.constants.weight);
  FactorPlace place = {};
  int64_t rows = 0, column = 0;
  if (kMatrix) {
    place = place_of(d.s, first);
    rows = 32 / d.s.columns;
    column = 32 - rows * d.s.columns;
  }
  F32x1 sums[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int64_t ahead = first; ahead < end; ahead += 32 * kAhead) {
    float params[kAhead], grads[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      params[k] = grads[k] = 0.0f;
      if (ahead + 32 * k >= end) continue;
      params[k] = load_param_one(row, ahead + 32 * k);
      grads[k] = open_grad_one(row, d.f, ahead + 32 * k);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = ahead + 32 * k;
      if (at >= end) continue;
      const float g = grads[k];
      F32x1 u;
      if (kMatrix) {
        u = direction_at(factors, place, g, d.f.constants.limit);
        advance(d.s, rows, column, &place);
      } else {
        const bool keep = row.mask == nullptr || load_global(on_global(row.mask + at)) != 0;
        const float before = load_one(row.state[0], row.state_dtype, at);
        const float square = (F32x1(g) * F32x1(g)).v;
        const float variance = move_state(d.c, 0, at, before, square, average, keep);
        u = adafactor_vector_direction(F32x1(g), F32x1(variance), F32x1(d.f.constants.limit));
      }
      sums[0] = fma(F32x1(params[k]), F32x1(params[k]), sums[0]);
      sums[1] = fma(u, u, sums[1]);
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) squares[k] += lanes_in_chains(sums[k].v);
}

template <bool kMatrix>
TT_DEVICE void direction_blocks(const DirectionRow& d, int64_t begin, int64_t end,
                                double (&squares)[2]) {
#pragma unroll 1
  for (int64_t at = begin; at < end; at += kDirectionBlock)
    direction_block<kMatrix>(d, at, ::min(at + kDirectionBlock, end), squares);
}

// What the last warp of a tensor finds.
TT_DEVICE void end_direction(const AdafactorParams& params, const OptimRow& row, int64_t at,
                             const AdafactorShape& s, AdafactorFacts f, int64_t blocks) {
  const double param = warp_sum(params.step.param_sums + row.first_block, blocks);
  const double direction = warp_sum(params.step.direction_sums + row.first_block, blocks);
  if (threadIdx.x % 32 != 0) return;
  if (params.part == TT_ADAFACTOR_DIRECTION) {
    store_global(sums_of(params, s), param);
    store_global(sums_of(params, s) + 1, direction);
    return;
  }
  f.constants.rate = rate_of(params, row, s, f, param, direction);
  store_global(on_global(reinterpret_cast<AdafactorFacts*>(constants_of(params, at))), f);
}

__global__ void __launch_bounds__(kNormThreads, 4)
    adafactor_direction_squares(const __grid_constant__ AdafactorParams params) {
  const OptimFacts facts = load_global(params.step.facts);
  const int64_t block = int64_t{blockIdx.x} * (kNormThreads / 32) + threadIdx.x / 32;
  if (facts.skip || block >= params.step.n_blocks) return;
  const OptimPiece piece = load_global(params.step.table.blocks + block);
  const OptimRow row = load_global(params.step.table.rows + piece.row);
  const AdafactorShape s = load_global(params.shapes + piece.row);
  const AdafactorFacts own = facts_of(params, piece.row);
  const CompactRow compact = {row, constants_of(params, piece.row), params.step.stochastic};
  const GradFacts f = grad_facts(params, facts, row, own.constants);
  const int64_t begin = int64_t{piece.at} * kNormBlock, end = ::min(begin + kNormBlock, row.numel);
  double squares[2] = {0.0, 0.0};
  if (s.batch > 0) {
    direction_blocks<true>({params, compact, s, f}, begin, end, squares);
  } else {
    direction_blocks<false>({params, compact, s, f}, begin, end, squares);
  }

  // The sums before the count, the count before the others' sums.
  const int64_t blocks = (row.numel + kNormBlock - 1) / kNormBlock;
  uint32_t before = 0;
  if (threadIdx.x % 32 == 0) {
    store_global(params.step.param_sums + block, squares[0]);
    store_global(params.step.direction_sums + block, squares[1]);
    __threadfence();
    before = atomicAdd(params.step.counts + piece.row, 1u);
  }
  if (__shfl_sync(kAllLanes, before, 0) != uint32_t(blocks - 1)) return;
  __threadfence();
  end_direction(params, row, piece.row, s, own, blocks);
}

// --- the update

struct UpdateRow {
  const CompactRow& c;
  const AdafactorShape& s;
  const GradFacts& f;
  FactorArrays factors;
};

TT_DEVICE float updated(const GradFacts& f, float p, float u) {
  const F32x1 x =
      adafactor_update(F32x1(p), F32x1(u), F32x1(f.constants.decay), F32x1(f.constants.rate));
  if (!(f.threshold > 0.0f)) return x.v;
  return copysign(max(F32x1(0.0f), abs(x) - F32x1(f.threshold)), x).v;
}

// The directions of eight adjacent elements.
TT_DEVICE void directions_of_eight(const UpdateRow& d, int64_t at, const float (&g)[kEight],
                                   float (&u)[kEight]) {
  const float limit = d.f.constants.limit;
  if (d.s.batch == 0) {
    float variance[kEight];
    widen(load_raw(d.c.row.state[0], d.c.row.state_dtype, at), d.c.row.state_dtype, variance);
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      u[j] = adafactor_vector_direction(F32x1(g[j]), F32x1(variance[j]), F32x1(limit)).v;
    return;
  }
  FactorPlace place = place_of(d.s, at);
  if (d.s.columns % kEight == 0 && place.column % kEight == 0) {
    float column[kEight];
    widen(load_raw(d.factors.column, TT_F32, place.columns + place.column), TT_F32, column);
    const float row = load_global(d.factors.row + place.row);
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      u[j] = adafactor_direction(F32x1(g[j]), F32x1(row), F32x1(column[j]), F32x1(limit)).v;
    return;
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    u[j] = direction_at(d.factors, place, g[j], limit);
    advance(d.s, 0, 1, &place);
  }
}

// Eight adjacent elements, all there, all aligned.
template <bool kCompact>
TT_DEVICE void update_eight(const UpdateRow& d, int64_t at) {
  const OptimRow& row = d.c.row;
  const RawChunk<float> raw_p = load_raw(row.param, row.param_dtype, at);
  const RawChunk<float> raw_g = load_raw(row.grad, row.grad_dtype, at);
  float p[kEight], g[kEight], u[kEight];
  widen(raw_p, row.param_dtype, p);
  if (kCompact && row.master_kind != TT_MASTER_NONE) {
    const RawChunk<float> raw_master = load_raw(row.master, TT_BF16, at);
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      p[j] = open_master(row.master_kind, half_word(raw_p, j), half_word(raw_master, j));
  }
  open_grad_eight(row, d.f, at, raw_g, g);
  directions_of_eight(d, at, g, u);
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    p[j] = updated(d.f, p[j], u[j]);
    if (row.mask != nullptr && load_global(on_global(row.mask + at + j)) == 0) p[j] = 0.0f;
  }
  if (row.copy != nullptr) store_eight(row.copy, row.copy_dtype, at, p);
  if (kCompact) {
    store_param(d.c, at, p);
  } else {
    store_eight(row.param, row.param_dtype, at, p);
#pragma unroll
    for (int j = 0; j < kEight; ++j) p[j] = rounded(row.param_dtype, p[j]);
  }
  if (row.ema != nullptr) {
    float e[kEight];
    widen(load_raw(row.ema, TT_F32, at), TT_F32, e);
#pragma unroll
    for (int j = 0; j < kEight; ++j) e[j] = averaged(e[j], p[j], d.f.ema_rest);
    store_eight(row.ema, TT_F32, at, e);
  }
  if (d.f.zero_grad) {
    const float zero[kEight] = {};
    store_eight(row.grad, row.grad_dtype, at, zero);
  }
}

TT_DEVICE void update_one(const UpdateRow& d, int64_t at) {
  const OptimRow& row = d.c.row;
  const float limit = d.f.constants.limit;
  const float g = open_grad_one(row, d.f, at);
  float u;
  if (d.s.batch > 0) {
    u = direction_at(d.factors, place_of(d.s, at), g, limit);
  } else {
    const float variance = load_one(row.state[0], row.state_dtype, at);
    u = adafactor_vector_direction(F32x1(g), F32x1(variance), F32x1(limit)).v;
  }
  const bool keep = row.mask == nullptr || load_global(on_global(row.mask + at)) != 0;
  const float p = keep ? updated(d.f, load_param_one(row, at), u) : 0.0f;
  if (row.copy != nullptr) store_one(row.copy, row.copy_dtype, at, p);
  const float stored = store_param_one(d.c, at, p);
  if (row.ema != nullptr)
    store_global(on_global(row.ema + at),
                 averaged(load_global(on_global(row.ema + at)), stored, d.f.ema_rest));
  if (d.f.zero_grad) store_one(row.grad, row.grad_dtype, at, 0.0f);
}

// A skipped step: the gradients alone.
TT_DEVICE void zero_gradients(const OptimRow& row, int64_t begin, int64_t end) {
  for (int64_t at = begin + threadIdx.x; at < end; at += kUpdateThreads)
    store_one(row.grad, row.grad_dtype, at, 0.0f);
}

// kCompact: masters or stochastic rounding may occur.
template <bool kCompact>
__global__ void __launch_bounds__(kUpdateThreads, kCompact ? 4 : 6)
    adafactor_apply(const __grid_constant__ AdafactorParams params) {
  const OptimPiece piece = load_global(params.step.table.pieces + blockIdx.x);
  const OptimRow row = load_global(params.step.table.rows + piece.row);
  const OptimFacts facts = load_global(params.step.facts);
  const int64_t first = int64_t{piece.at} * kTile - row.shift;
  const int64_t last = ::min(first + int64_t{params.step.tiles} * kTile, row.numel);
  if (facts.skip) {
    if (params.step.zero_grad) zero_gradients(row, ::max(first, int64_t{0}), last);
    return;
  }
  const AdafactorShape s = load_global(params.shapes + piece.row);
  AdafactorFacts own = facts_of(params, piece.row);
  if (params.part == TT_ADAFACTOR_UPDATE)
    own.constants.rate = rate_of(params, row, s, own, load_global(sums_of(params, s)),
                                 load_global(sums_of(params, s) + 1));
  float* const constants = constants_of(params, piece.row);
  GradFacts f = grad_facts(params, facts, row, own.constants);
  f.threshold = load_global(on_global(constants + kThreshold));
  const CompactRow compact = {row, constants, kCompact && params.step.stochastic};
  const UpdateRow d = {compact, s, f, factors_of(params, s)};
#pragma unroll 1
  for (int64_t tile = first; tile < last; tile += kTile) {
    if (row.wide && tile >= 0 && tile + kTile <= row.numel) {
      update_eight<kCompact>(d, tile + int64_t{threadIdx.x} * kEight);
      continue;
    }
#pragma unroll 1
    for (int64_t at = tile + threadIdx.x; at < ::min(tile + kTile, last); at += kUpdateThreads)
      if (at >= 0) update_one(d, at);
  }
}

}  // namespace
}  // namespace trimtab
