#include <cmath>
#include <cstring>

#include "cpu/adafactor_job.h"
#include "cpu/optim_blocks.h"

namespace trimtab {
namespace {

// --- blocks of a tile

// body(begin, r, rows, c, columns): blocks of at most kOptimBlock elements without gaps, from element
// `begin` of the matrices on, at row r of all batches and column c.
template <class Body>
void for_blocks(const Item& item, int64_t tile, Body&& body) {
  const int64_t column_tile = tile % item.column_tiles, rest = tile / item.column_tiles;
  const int64_t batch = rest / item.row_tiles, row_tile = rest % item.row_tiles;
  const int64_t first = row_tile * kTileRows, last = std::min(item.rows, first + kTileRows);
  const int64_t left = column_tile * kTileColumns;
  const int64_t right = std::min(item.columns, left + kTileColumns);
  const bool whole = item.columns <= kOptimBlock;  // rows follow each other without gaps
  const int64_t height = whole ? std::max<int64_t>(1, kOptimBlock / item.columns) : 1;
  for (int64_t r = first; r < last; r += height) {
    const int64_t row = batch * item.rows + r, rows = std::min(height, last - r);
    for (int64_t c = left; c < right; c += kOptimBlock)
      body(row * item.columns + c, row, rows, c, std::min(right - c, kOptimBlock));
  }
}

// A block of gradients as the formulas see it.
const float* open_grad(const Adafactor& a, const Item& item, Window& grad, int64_t begin,
                       int64_t n) {
  const OptimJob& job = a.job;
  const tt_optim_tensor& t = a.tensor(item);
  grad.open(job.kernels, t.grad, t.grad_dtype, begin, n);
  const bool changes = job.scale != 1.0f || job.clip != 1.0f || item.sign != 1.0f;
  const float* g = changes ? prepare_block(job, item.sign, grad, n) : grad.values;
  if (t.mask == nullptr) return g;
  if (g != grad.buffer) std::memcpy(grad.buffer, g, size_t(n) * sizeof(float));
  job.kernels.apply_mask(grad.buffer, t.mask + begin, n);
  return grad.buffer;
}

// --- the passes, a tile at a time

void squares_tile(const Adafactor& a, const Item& item, int64_t tile) {
  const int64_t column_tile = tile % item.column_tiles, rest = tile / item.column_tiles;
  const int64_t row_tile = rest % item.row_tiles, batch = rest / item.row_tiles;
  const int64_t left = column_tile * kTileColumns;
  const int64_t first = batch * item.rows + row_tile * kTileRows;
  double* const rows_out = item.row_parts + column_tile * item.batch * item.rows;
  float* const columns_out = item.column_parts + (row_tile * item.batch + batch) * item.columns;
  std::fill_n(rows_out + first, std::min(kTileRows, item.rows - row_tile * kTileRows), 0.0);
  std::fill_n(columns_out + left, std::min(kTileColumns, item.columns - left), 0.0f);
  for_blocks(item, tile, [&](int64_t begin, int64_t r, int64_t rows, int64_t c, int64_t columns) {
    Window grad;
    const float* g = open_grad(a, item, grad, begin, rows * columns);
    a.kernels.square_sums(g, rows, columns, rows_out + r, columns_out + c);
  });
}

void direction_block(const Adafactor& a, const Item& item, int64_t begin, int64_t n,
                     double* squares) {
  const OptimJob& job = a.job;
  const tt_optim_tensor& t = a.tensor(item);
  const float limit = item.constants.limit;
  Window grad;
  ParamWindow param;
  const float* g = open_grad(a, item, grad, begin, n);
  param.open(job.kernels, job.memory, t, begin, n);
  if (item.is_matrix())
    return a.kernels.direction_squares(param.values, g, item.factors(), begin, n, limit, squares);
  Window variance;  // first moved and stored, then read again as it was rounded
  variance.open(job.kernels, t.state[0], t.state_dtype, begin, n);
  a.kernels.average_squares(variance.values, g, item.constants.weight, n);
  if (t.mask) job.kernels.apply_mask(variance.values, t.mask + begin, n);
  variance.close(job.kernels, BlockRounding(job, t, item.step, begin)(1), n);
  variance.open(job.kernels, t.state[0], t.state_dtype, begin, n);
  a.kernels.vector_squares(param.values, g, variance.values, limit, squares, n);
}

void direction_tile(const Adafactor& a, const Item& item, int64_t tile) {
  const int64_t last = std::min(item.numel, (tile + 1) * kFlatTile);
  for (int64_t begin = tile * kFlatTile; begin < last; begin += kNormBlock) {
    double* const squares = item.block_squares + begin / kNormBlock * 2;
    squares[0] = squares[1] = 0.0;
    const int64_t end = std::min(last, begin + kNormBlock);
    for (int64_t at = begin; at < end; at += kOptimBlock)
      direction_block(a, item, at, std::min(end - at, kOptimBlock), squares);
  }
}

void update_block(const Adafactor& a, const Item& item, int64_t begin, int64_t n) {
  const OptimJob& job = a.job;
  const tt_optim_tensor& t = a.tensor(item);
  const tt_optim_group& group = job.call.groups[t.group];
  Window grad;
  ParamWindow param;
  const float* g = open_grad(a, item, grad, begin, n);
  param.open(job.kernels, job.memory, t, begin, n);
  if (item.is_matrix()) {
    a.kernels.update(param.values, g, item.factors(), begin, n, item.constants);
  } else {
    Window variance;
    variance.open(job.kernels, t.state[0], t.state_dtype, begin, n);
    a.kernels.vector_update(param.values, g, variance.values, item.constants, n);
  }
  const BlockRounding rounding(job, t, item.step, begin);
  close_param(job, t, float(group.lr * group.l1), rounding(0), param, begin, n);
  if (job.call.zero_grad) std::memset(grad.data, 0, size_t(n * bytes_of(t.grad_dtype)));
}

void update_tile(const Adafactor& a, const Item& item, int64_t tile) {
  const int64_t end = std::min(item.numel, (tile + 1) * kFlatTile);
  for (int64_t at = tile * kFlatTile; at < end; at += kOptimBlock)
    update_block(a, item, at, std::min(end - at, kOptimBlock));
}

}  // namespace

const TilePass kSquares = {&Item::tiles, squares_tile};
const TilePass kDirection = {&Item::flat_tiles, direction_tile};
const TilePass kUpdate = {&Item::flat_tiles, update_tile};

// --- between the passes

void add_squares(const Item& item) {
  if (!item.is_matrix()) return;
  const int64_t rows = item.batch * item.rows, columns = item.batch * item.columns;
  double* const row_sums = item.row_sums();
  double* const column_sums = item.column_sums();
  std::copy_n(item.row_parts, rows, row_sums);
  for (int64_t k = 1; k < item.column_tiles; ++k)
    for (int64_t i = 0; i < rows; ++i) row_sums[i] += item.row_parts[k * rows + i];
  double chains[kColumnChains - 1][kOptimBlock];  // the first one is where the sums belong
  for (int64_t begin = 0; begin < columns; begin += kOptimBlock) {
    const int64_t n = std::min(columns - begin, kOptimBlock);
    const auto chain = [&](int64_t k) { return k > 0 ? chains[k - 1] : column_sums + begin; };
    int64_t used = std::min<int64_t>(item.row_tiles, kColumnChains);
    if (used == 0) std::fill_n(chain(0), n, 0.0);  // a piece without rows
    for (int64_t k = 0; k < item.row_tiles; ++k) {
      const float* const parts = item.column_parts + k * columns + begin;
      double* const to = chain(k % kColumnChains);
      if (k < used) {
        std::copy_n(parts, n, to);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] += double(parts[i]);
      }
    }
    for (int64_t half = kColumnChains / 2; half > 0; half /= 2) {
      for (int64_t k = 0; k + half < used; ++k)
        for (int64_t i = 0; i < n; ++i) chain(k)[i] += chain(k + half)[i];
      used = std::min(used, half);
    }
  }
}

namespace {

// state = lerp(state, sums / count), n numbers; what it is then, into `out`.
void average_state(const Adafactor& a, const Item& item, int k, const double* sums, double count,
                   float* out, int64_t n) {
  const OptimJob& job = a.job;
  const tt_optim_tensor& t = a.tensor(item);
  for (int64_t begin = 0; begin < n; begin += kOptimBlock) {
    const int64_t size = std::min(n - begin, kOptimBlock);
    Window state;
    state.open(job.kernels, t.state[k], t.state_dtype, begin, size);
    if (sums) {
      a.kernels.average(state.values, sums + begin, count, item.constants.weight, size);
      state.close(job.kernels, BlockRounding(job, t, item.step, begin)(1 + k), size);
      state.open(job.kernels, t.state[k], t.state_dtype, begin, size);
    }
    std::copy_n(state.values, size, out + begin);
  }
}

}  // namespace

void average(const Adafactor& a, const Item& item, bool moves) {
  if (!item.is_matrix()) return;
  const tt_adafactor_shape& shape = a.call.shapes[item.index];
  average_state(a, item, 0, moves ? item.row_sums() : nullptr, double(shape.whole_columns),
                item.row_factor, item.batch * item.rows);
  average_state(a, item, 1, moves ? item.column_sums() : nullptr, double(shape.whole_rows),
                item.column_factor, item.batch * item.columns);
  if (!moves) return;
  for (int64_t b = 0; b < item.batch; ++b) {
    const float* const row_var = item.row_factor + b * item.rows;
    item.means()[b] = add_up((item.rows + kMeanRows - 1) / kMeanRows, [&](int64_t k) {
      const int64_t first = k * kMeanRows;
      return add_up(std::min(kMeanRows, item.rows - first),
                    [&](int64_t r) { return double(row_var[first + r]); });
    });
  }
}

// After average, which has put the states there.
void make_factors(const Adafactor& a, const Item& item) {
  if (!item.is_matrix()) return;
  const double eps1 = a.group(item).eps1;
  const double rows = double(a.call.shapes[item.index].whole_rows);
  for (int64_t b = 0; b < item.batch; ++b) {
    const double mean = item.means()[b] / rows;
    float* const row = item.row_factor + b * item.rows;
    for (int64_t r = 0; r < item.rows; ++r) row[r] = adafactor_row_factor(row[r], mean, eps1);
  }
  for (int64_t c = 0; c < item.batch * item.columns; ++c)
    item.column_factor[c] = adafactor_column_factor(item.column_factor[c]);
}

void add_directions(const Item& item) {
  for (int k = 0; k < 2; ++k)
    item.sums[k] =
        add_up(item.blocks(), [&](int64_t block) { return item.block_squares[2 * block + k]; });
}

void set_rate(const Adafactor& a, Item& item) {
  const tt_adafactor_group& own = a.group(item);
  const double lr = a.job.call.groups[a.tensor(item).group].lr;
  const double numel = double(a.call.shapes[item.index].whole_numel);
  item.constants.rate =
      adafactor_rate(lr, own.eps2, own.d, item.step, numel, item.sums[0], item.sums[1]);
}

}  // namespace trimtab
