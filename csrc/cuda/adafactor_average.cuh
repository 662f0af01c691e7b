// Adafactor's second moment on CUDA, in three launches: sums of squares of tiles; these to row_var, col_var and
// the factors of columns; then the factors of rows, which need the mean of row_var. The sums run in the order
// that math/adafactor.h gives.
#pragma once
#include "cuda/adafactor_table.cuh"

namespace trimtab {
namespace {

// --- squares. A block of 128 threads takes whole row tiles as long as kSquareValues hold them, or one row tile
// of 512 columns in several chunks of rows. Its gradients go to shared memory, as they lie in global memory;
// a thread adds up columns, a warp (of narrow matrices a thread) rows.

// Rows first .. last - 1 of all matrices, and of these `width` columns from `column` on.
struct SquareChunk {
  int64_t first, last, column;
  int width;
};

TT_DEVICE float open_grad_one(const OptimRow& row, const GradFacts& f, int64_t at) {
  float g = load_one(row.grad, row.grad_dtype, at);
  if (prepares(row, f)) g = prepared(row, f, g);
  return row.mask == nullptr || load_global(on_global(row.mask + at)) != 0 ? g : 0.0f;
}

TT_DEVICE void open_grad_eight(const OptimRow& row, const GradFacts& f, int64_t at,
                               const RawChunk<float>& raw, float (&g)[kEight]) {
  widen(raw, row.grad_dtype, g);
  if (prepares(row, f)) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) g[j] = prepared(row, f, g[j]);
  }
  if (row.mask == nullptr) return;
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    if (load_global(on_global(row.mask + at + j)) == 0) g[j] = 0.0f;
}

// `lines` lines of `length` elements, `stride` apart from `begin` on, to shared memory without gaps.
struct SquareLines {
  int64_t begin, stride;
  int lines, length;
};

TT_DEVICE void load_eights(const OptimRow& row, const GradFacts& f, const SquareLines& from,
                           float* values) {
  constexpr int kAhead = 4;  // loads under way
  const int per_line = from.length / kEight, units = from.lines * per_line;
#pragma unroll 1
  for (int first = threadIdx.x; first < units; first += kAhead * kSquareThreads) {
    RawChunk<float> raw[kAhead];
    int64_t at[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int unit = first + k * kSquareThreads;
      const int line = from.lines == 1 ? 0 : unit / per_line;
      at[k] = from.begin + line * from.stride + (unit - line * per_line) * kEight;
      raw[k] = {};
      if (unit < units) raw[k] = load_raw(row.grad, row.grad_dtype, at[k]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int unit = first + k * kSquareThreads;
      if (unit >= units) continue;
      float g[kEight];
      open_grad_eight(row, f, at[k], raw[k], g);
#pragma unroll
      for (int j = 0; j < kEight; ++j) values[unit * kEight + j] = g[j];
    }
  }
}

TT_DEVICE void load_ones(const OptimRow& row, const GradFacts& f, const SquareLines& from,
                         float* values) {
  const int units = from.lines * from.length;
#pragma unroll 4
  for (int unit = threadIdx.x; unit < units; unit += kSquareThreads) {
    const int line = from.lines == 1 ? 0 : unit / from.length;
    values[unit] =
        open_grad_one(row, f, from.begin + line * from.stride + (unit - line * from.length));
  }
}

TT_DEVICE void load_chunk_of(const OptimRow& row, const GradFacts& f, const AdafactorShape& s,
                             const SquareChunk& chunk, float* values) {
  const int rows = int(chunk.last - chunk.first);
  SquareLines from = {chunk.first * s.columns + chunk.column, s.columns, rows, chunk.width};
  if (chunk.width == s.columns) from = {from.begin, 0, 1, rows * chunk.width};
  const bool whole = row.wide && row.shift == 0 && from.begin % kEight == 0 &&
                     from.stride % kEight == 0 && from.length % kEight == 0;
  whole ? load_eights(row, f, from, values) : load_ones(row, f, from, values);
}

// Lane c's sum of squares: 4 k + i into sum i, (0 + 1) + (2 + 3).
TT_DEVICE double lanes_in_chains(float lane_sum) {
  const int chain = threadIdx.x % 4;
  double total = 0.0;
#pragma unroll
  for (int k = 0; k < 8; ++k) total += double(__shfl_sync(kAllLanes, lane_sum, 4 * k + chain));
  total += __shfl_xor_sync(kAllLanes, total, 1);
  return total + __shfl_xor_sync(kAllLanes, total, 2);
}

// Rows of at most 8: a thread each.
TT_DEVICE double narrow_row(const float* values, int width) {
  double chain[4] = {};
#pragma unroll
  for (int c = 0; c < 8; ++c)
    if (c < width) chain[c % 4] += double((F32x1(values[c]) * F32x1(values[c])).v);
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

TT_DEVICE void add_rows(const SquareChunk& chunk, const float* values, double* to) {
  const int rows = int(chunk.last - chunk.first), width = chunk.width;
  if (width <= 8) {
    for (int r = threadIdx.x; r < rows; r += kSquareThreads)
      store_global(to + r, narrow_row(values + r * width, width));
    return;
  }
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < rows; r += kSquareThreads / 32) {
    F32x1 sum = 0.0f;
#pragma unroll 4
    for (int c = lane; c < width; c += 32)
      sum = fma(F32x1(values[r * width + c]), F32x1(values[r * width + c]), sum);
    const double total = lanes_in_chains(sum.v);
    if (lane == 0) store_global(to + r, total);
  }
}

// All columns of row tiles first .. first + tiles - 1. Between chunks the sums of the one tile that then is lie
// in `kept`.
TT_DEVICE void add_columns(const AdafactorShape& s, const SquareChunk& chunk, int64_t first,
                           int tiles, const float* values, float* kept, float* to) {
  const int width = chunk.width;
#pragma unroll 1
  for (int i = threadIdx.x; i < tiles * width; i += kSquareThreads) {
    const int c = i % width;
    const int64_t tile = first + i / width, matrix = tile / s.row_tiles;
    const int64_t tile_of_matrix = tile - matrix * s.row_tiles;
    const int64_t begin = matrix * s.rows + tile_of_matrix * kTileRows;
    const int64_t end = begin + ::min(kTileRows, s.rows - tile_of_matrix * kTileRows);
    const int from = int(::max(begin, chunk.first) - chunk.first);
    const int until = int(::min(end, chunk.last) - chunk.first);
    F32x1 sum = begin < chunk.first ? kept[c] : 0.0f;
#pragma unroll 4
    for (int r = from; r < until; ++r)
      sum = fma(F32x1(values[r * width + c]), F32x1(values[r * width + c]), sum);
    if (end > chunk.last) {
      kept[c] = sum.v;
    } else {
      const int64_t column = matrix * s.columns + chunk.column + c;
      store_global(to + tile_of_matrix * s.batch * s.columns + column, sum.v);
    }
  }
}

__global__ void __launch_bounds__(kSquareThreads, 4)
    adafactor_squares(const __grid_constant__ AdafactorParams params) {
  const OptimFacts facts = load_global(params.step.facts);
  if (facts.skip) return;
  const OptimPiece piece = load_global(params.squares + blockIdx.x);
  const OptimRow row = load_global(params.step.table.rows + piece.row);
  const AdafactorShape s = load_global(params.shapes + piece.row);
  const GradFacts f = grad_facts(params, facts, row, {});
  float* const values = reinterpret_cast<float*>(shared_memory());
  const int64_t first = piece.at / s.row_blocks * s.tiles, block = piece.at % s.row_blocks;
  const int tiles = int(::min(s.tiles, s.batch * s.row_tiles - first));
  const auto begin_of = [&](int64_t tile) {  // its first row among all
    return tile / s.row_tiles * s.rows + tile % s.row_tiles * kTileRows;
  };
  const int64_t begin = begin_of(first), end = begin_of(first + tiles - 1);
  const int64_t last =
      end + ::min(kTileRows, s.rows - (first + tiles - 1) % s.row_tiles * kTileRows);
  SquareChunk chunk = {begin, begin, block * kRowBlock, 0};
  chunk.width = int(::min(int64_t{kRowBlock}, s.columns - chunk.column));
  double* const row_parts = params.row_parts + s.row_parts + block * s.batch * s.rows;
#pragma unroll 1
  for (; chunk.first < last; chunk.first = chunk.last) {
    chunk.last = ::min(last, chunk.first + kSquareValues / chunk.width);
    load_chunk_of(row, f, s, chunk, values);
    __syncthreads();
    add_columns(s, chunk, first, tiles, values, values + kSquareValues,
                params.column_parts + s.column_parts);
    add_rows(chunk, values, row_parts + chunk.first);
    __syncthreads();
  }
}

// --- averages

TT_DEVICE double row_sum(const AdafactorParams& params, const AdafactorShape& s, int64_t at) {
  constexpr int64_t kBlocks = kTileColumns / kRowBlock;
  const double* const parts = params.row_parts + s.row_parts + at;
  double sum = 0.0;
#pragma unroll 1
  for (int64_t block = 0; block < s.row_blocks; block += kBlocks) {
    double tile = 0.0;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k)
      if (block + k < s.row_blocks) tile += load_global(parts + (block + k) * s.batch * s.rows);
    sum += tile;
  }
  return sum;
}

// `count` sums side by side in shared memory, n numbers each: in the order of math/norm.h, into the first of each.
TT_DEVICE void add_in_shared(double* values, int count, int n) {
  int used = n < kNormSums ? n : kNormSums;
  __syncthreads();
  if (n > kNormSums) {
    for (int i = threadIdx.x; i < count * used; i += kAverageThreads) {
      double* const own = values + i / used * n;
      for (int k = i % used + kNormSums; k < n; k += kNormSums) own[i % used] += own[k];
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int half = kNormSums / 2; half > 0; half /= 2) {
    if (half >= used) continue;
    const int upper = used - half;
    for (int i = threadIdx.x; i < count * upper; i += kAverageThreads) {
      double* const own = values + i / upper * n + i % upper;
      own[0] += own[half];
    }
    used = half;
    __syncthreads();
  }
}

// The rows of a piece: those of `matrices` matrices, or `each` rows of one.
struct RowPiece {
  int64_t first;  // row among all
  int64_t mean;  // number of the first part of a mean
  int matrices, each;
};

TT_DEVICE RowPiece row_piece(const AdafactorShape& s, int64_t at) {
  if (s.mean_parts > 1) {
    const int64_t matrix = at / s.mean_parts, begin = at % s.mean_parts * kMeanRows;
    return {matrix * s.rows + begin, at, 1, int(::min(kMeanRows, s.rows - begin))};
  }
  const int64_t matrix = at * s.matrices;
  return {matrix * s.rows, matrix, int(::min(s.matrices, s.batch - matrix)), int(s.rows)};
}

TT_DEVICE void average_rows(const AdafactorParams& params, const CompactRow& c,
                            const AdafactorShape& s, const AdafactorFacts& f, int64_t piece) {
  const RowPiece p = row_piece(s, piece);
  const Lerp average = lerp_constants(f.constants.weight);
  double* const values = reinterpret_cast<double*>(shared_memory());
  const bool sums_only = params.part == TT_ADAFACTOR_SQUARES;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.matrices * p.each; i += kAverageThreads) {
    const int64_t at = p.first + i;
    double* const whole = params.sums == nullptr ? nullptr : row_sums(params, s) + at;
    const double sum =
        params.part == TT_ADAFACTOR_AVERAGE ? load_global(whole) : row_sum(params, s, at);
    if (sums_only) {
      store_global(whole, sum);
      continue;
    }
    const float now = move_state(c, 0, at, load_one(c.row.state[0], c.row.state_dtype, at),
                                 float(sum / double(s.whole_columns)), average, true);
    store_global(params.row_factor + s.row_factor + at, now);
    values[i] = double(now);
  }
  if (sums_only) return;
  add_in_shared(values, p.matrices, p.each);
  for (int i = threadIdx.x; i < p.matrices; i += kAverageThreads)
    store_global(params.means + s.means + p.mean + i, values[i * p.each]);
}

// 32 columns, a warp a chain of row tiles; of matrices of one row tile 256.
TT_INLINE int64_t columns_of_piece(const AdafactorShape& s) {
  return s.row_tiles > 1 ? 32 : kAverageThreads;
}

TT_DEVICE double column_sum(const AdafactorParams& params, const AdafactorShape& s, int64_t at) {
  const int64_t columns = s.batch * s.columns;
  const float* const parts = params.column_parts + s.column_parts + at;
  if (s.row_tiles <= 1) return s.row_tiles < 1 || at >= columns ? 0.0 : double(load_global(parts));
  double* const values = reinterpret_cast<double*>(shared_memory());
  const int lane = threadIdx.x % 32, chain = threadIdx.x / 32;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t k = chain; k < s.row_tiles; k += kColumnChains)
    if (at < columns) sum += double(load_global(parts + k * columns));
  values[threadIdx.x] = sum;
#pragma unroll 1
  for (int half = kColumnChains / 2; half > 0; half /= 2) {
    __syncthreads();
    if (chain < half) values[threadIdx.x] += values[threadIdx.x + 32 * half];
  }
  return values[lane];
}

TT_DEVICE void average_columns(const AdafactorParams& params, const CompactRow& c,
                               const AdafactorShape& s, const AdafactorFacts& f, int64_t piece) {
  const int64_t width = columns_of_piece(s), columns = s.batch * s.columns;
  const int64_t at = piece * width + threadIdx.x % width;
  const bool speaks = threadIdx.x < width && at < columns;
  double* const whole = params.sums == nullptr ? nullptr : column_sums(params, s) + at;
  double sum = 0.0;
  if (params.part != TT_ADAFACTOR_AVERAGE) sum = column_sum(params, s, at);
  if (!speaks) return;
  if (params.part == TT_ADAFACTOR_SQUARES) return store_global(whole, sum);
  if (params.part == TT_ADAFACTOR_AVERAGE) sum = load_global(whole);
  const float now =
      move_state(c, 1, at, load_one(c.row.state[1], c.row.state_dtype, at),
                 float(sum / double(s.whole_rows)), lerp_constants(f.constants.weight), true);
  store_global(params.column_factor + s.column_factor + at, adafactor_column_factor(now));
}

__global__ void __launch_bounds__(kAverageThreads, 4)
    adafactor_average(const __grid_constant__ AdafactorParams params) {
  if (load_global(&params.step.facts->skip)) return;
  const bool rows = blockIdx.x < params.n_rows_pieces;
  const OptimPiece piece = load_global(rows ? params.rows + blockIdx.x
                                            : params.columns + (blockIdx.x - params.n_rows_pieces));
  const OptimRow row = load_global(params.step.table.rows + piece.row);
  const AdafactorShape s = load_global(params.shapes + piece.row);
  const AdafactorFacts f = facts_of(params, piece.row);
  const CompactRow compact = {row, constants_of(params, piece.row), params.step.stochastic};
  if (rows) {
    average_rows(params, compact, s, f, piece.at);
  } else {
    average_columns(params, compact, s, f, piece.at);
  }
}

// --- factors of rows

// The sum of row_var over the matrix in which a piece lies that is no whole one, in every thread.
TT_DEVICE double mean_of_parts(const AdafactorParams& params, const AdafactorShape& s,
                               int64_t matrix) {
  double* const values = reinterpret_cast<double*>(shared_memory());
  const double* const parts = params.means + s.means + matrix * s.mean_parts;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < s.mean_parts; k += kNormSums) sum += load_global(parts + k);
  values[threadIdx.x] = sum;
  add_in_shared(values, 1, kNormSums);
  return values[0];
}

__global__ void __launch_bounds__(kAverageThreads, 4)
    adafactor_factors(const __grid_constant__ AdafactorParams params) {
  if (load_global(&params.step.facts->skip)) return;
  const OptimPiece piece = load_global(params.rows + blockIdx.x);
  const OptimRow row = load_global(params.step.table.rows + piece.row);
  const AdafactorShape s = load_global(params.shapes + piece.row);
  const RowPiece p = row_piece(s, piece.at);
  const double eps1 = load_global(&params.groups[row.group].eps1);
  const bool in_parts = s.mean_parts > 1, given = params.part == TT_ADAFACTOR_DIRECTION;
  double mean = 0.0;
  if (in_parts && !given) mean = mean_of_parts(params, s, p.mean / s.mean_parts);
  const auto mean_of = [&](int64_t matrix) {
    if (given) return load_global(mean_sums(params, s) + matrix);
    return in_parts ? mean : load_global(params.means + s.means + matrix);
  };
  if (params.part == TT_ADAFACTOR_AVERAGE) {  // for all pieces of the matrix, its first one says it
    const int64_t matrix = p.first / s.rows;
    if (p.first % s.rows == 0)
      for (int i = threadIdx.x; i < p.matrices; i += kAverageThreads)
        store_global(mean_sums(params, s) + matrix + i, mean_of(matrix + i));
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.matrices * p.each; i += kAverageThreads) {
    const int64_t at = p.first + i;
    float* const to = params.row_factor + s.row_factor + at;
    const double average = mean_of(at / s.rows) / double(s.whole_rows);
    store_global(to, adafactor_row_factor(load_global(to), average, eps1));
  }
}

}  // namespace
}  // namespace trimtab
