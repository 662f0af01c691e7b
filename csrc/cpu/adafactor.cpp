// adafactor: passes over tiles of all matrices, and what is worked out between them.
//
//   squares    reads gradients: sums of squares of rows and columns
//   average    row_var, col_var and their factors: a number a row and one a column
//   direction  reads gradients and parameters: squares of parameter and direction (and steps a vector's
//              variance)
//   update     reads gradients and parameters, writes parameters
//
// 24 bytes an element of an fp32 matrix: the norms of the parameter and of its direction are to be known
// before the first element moves, and the direction needs all columns. Small tensors are stepped one after
// the other by one thread each, which finds them in its L2 from the second pass on; large ones one after
// the other by all threads. Each pass goes over the tiles in the order opposite to that of the one before, and so meets first
// what is still in the caches.
//
// Each tile has sums of its own, added up in an order that depends on the tensor's shape alone: the same bits
// for any number of threads, and on a GPU.
#include <trimtab/adafactor.h>

#include <cmath>

#include "cpu/adafactor_job.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

constexpr int64_t kSmall =
    65536;  // elements: gradient and parameter in fp32 are a quarter of an L2

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- all of it

// run(begin, end): some of an item's tiles, for all items of [first, last), in equal tasks.
template <class Run>
void for_tiles(const Adafactor& a, const tt_parallel* parallel, int64_t first, int64_t last,
               bool backwards, const TilePass& pass, Run&& run) {
  const int64_t start = a.offset[first], total = a.offset[last] - start;
  const tt_parallel pool = pool_or_serial(parallel, total >= kWorthThreads);
  const int64_t share = total / (int64_t(pool.threads) * 4) + 1;
  const int64_t task = std::min(std::max(share, kMinTask), kMaxTask);
  const int64_t tasks = ceil_div(total, task);
  parallel_run(pool, tasks, [&](int64_t at) {
    const int64_t begin = start + (backwards ? tasks - 1 - at : at) * task;
    const int64_t end = std::min(begin + task, start + total);
    int64_t i = std::upper_bound(a.offset + first, a.offset + last + 1, begin) - a.offset - 1;
    for (; i < last && a.offset[i] < end; ++i) {
      // Of the tiles, which share the elements as if they were equal, those that begin in the task.
      const int64_t numel = a.offset[i + 1] - a.offset[i], tiles = (a.items[i].*pass.tiles)();
      const double density = double(tiles) / double(numel);
      const auto tile_at = [&](int64_t element) {
        const int64_t within = element - a.offset[i];
        if (within <= 0) return int64_t(0);
        return within >= numel ? tiles : int64_t(std::ceil(double(within) * density));
      };
      run(a.items[i], tile_at(begin), tile_at(end));
    }
  });
}

void each_tile(const Adafactor& a, const Item& item, int64_t begin, int64_t end, bool backwards,
               const TilePass& pass) {
  const int64_t last = end - 1;
  for (int64_t tile = begin; tile < end; ++tile)
    pass.run(a, item, backwards ? last - (tile - begin) : tile);
}

void all_tiles(const Adafactor& a, const Item& item, bool backwards, const TilePass& pass) {
  each_tile(a, item, 0, (item.*pass.tiles)(), backwards, pass);
}

void run_pass(const Adafactor& a, const tt_parallel* parallel, int64_t first, int64_t last,
              bool backwards, const TilePass& pass) {
  for_tiles(a, parallel, first, last, backwards, pass,
            [&](const Item& item, int64_t begin, int64_t end) {
              each_tile(a, item, begin, end, backwards, pass);
            });
}

// One after the other, each by one thread.
void step_small(const Adafactor& a, const tt_parallel* parallel) {
  const int64_t total = a.offset[a.small];
  const tt_parallel pool = pool_or_serial(parallel, total >= kWorthThreads);
  const int64_t share = total / (int64_t(pool.threads) * 4) + 1;
  const int64_t task = std::min(std::max(share, kMinTask), kMaxTask);
  parallel_run(pool, ceil_div(total, task), [&](int64_t at) {
    int64_t* const end = a.offset + a.small;
    int64_t* from = std::lower_bound(a.offset, end, at * task);
    for (; from < end && *from < (at + 1) * task; ++from) {
      Item& item = a.items[from - a.offset];
      all_tiles(a, item, false, kSquares);
      add_squares(item);
      average(a, item, true);
      make_factors(a, item);
      all_tiles(a, item, true, kDirection);
      add_directions(item);
      set_rate(a, item);
      all_tiles(a, item, false, kUpdate);
    }
  });
}

// Items [first, last), by all threads: the part that was asked for.
void step_large(const Adafactor& a, const tt_parallel* parallel, int64_t first, int64_t last,
                int part) {
  const bool whole = part == TT_ADAFACTOR_WHOLE;
  const auto each = [&](auto&& body) {
    for (int64_t i = first; i < last; ++i) body(a.items[i]);
  };
  if (whole || part == TT_ADAFACTOR_SQUARES) {
    run_pass(a, parallel, first, last, false, kSquares);
    each([](Item& item) { add_squares(item); });
  }
  if (whole || part == TT_ADAFACTOR_AVERAGE) each([&](Item& item) { average(a, item, true); });
  if (part >= TT_ADAFACTOR_DIRECTION) each([&](Item& item) { average(a, item, false); });
  if (whole || part >= TT_ADAFACTOR_DIRECTION) each([&](Item& item) { make_factors(a, item); });
  if (whole || part == TT_ADAFACTOR_DIRECTION) {
    run_pass(a, parallel, first, last, true, kDirection);
    each([](Item& item) { add_directions(item); });
  }
  if (whole || part == TT_ADAFACTOR_UPDATE) {
    each([&](Item& item) { set_rate(a, item); });
    run_pass(a, parallel, first, last, false, kUpdate);
  }
}

// --- what is needed before

constexpr int64_t kTogether =
    1 << 20;  // elements of tensors that are stepped by all threads at once

int64_t batch_end(const Adafactor& a, int64_t first) {
  int64_t last = first + 1;
  while (last < a.count && a.offset[last + 1] - a.offset[first] <= kTogether) ++last;
  return last;
}

// before: the one made last, which most often has the same weight; or NULL.
Item item_of(const Adafactor& a, int64_t index, const Item* before) {
  const tt_optim_tensor& t = a.job.call.tensors[index];
  const tt_optim_group& group = a.job.call.groups[t.group];
  const tt_adafactor_group& own = a.call.groups[t.group];
  const tt_adafactor_shape& shape = a.call.shapes[index];
  Item item{};
  item.index = index;
  item.numel = t.numel;
  item.batch = shape.batch;
  item.rows = shape.batch ? shape.rows : 0;
  item.columns = shape.batch ? shape.columns : 0;
  item.row_tiles = ceil_div(item.rows, kTileRows);
  item.column_tiles = ceil_div(item.columns, kTileColumns);
  item.step = double(*t.step + 1.0f);
  item.sign = group.flags & TT_MAXIMIZE ? -1.0f : 1.0f;
  const bool same =
      before && before->step == item.step && a.group(*before).beta2_decay == own.beta2_decay;
  const double weight =
      same ? before->constants.weight : power_of_count(item.step, own.beta2_decay);
  item.constants = adafactor_constants(group, own.eps1, weight);
  if (a.call.part != TT_ADAFACTOR_WHOLE) item.sums = a.call.sums + shape.sums_at;
  return item;
}

void carve_parts(Item& item, Carver& carve) {
  carve(item.block_squares, 2 * item.blocks());
  carve(item.row_parts, item.column_tiles * item.batch * item.rows);
  carve(item.column_parts, item.row_tiles * item.batch * item.columns);
}

// All memory that the step needs, before it writes anything; false if there is none.
bool reserve(Adafactor& a) {
  const int64_t n = a.job.call.n_tensors;
  const bool whole = a.call.part == TT_ADAFACTOR_WHOLE;
  const auto is_small = [&](int64_t i) { return whole && a.job.call.tensors[i].numel <= kSmall; };
  const auto carve_arrays = [&](Carver& carve) {
    for (int64_t i = 0; i < a.count; ++i) {
      Item& item = a.items[i];
      const int64_t rows = item.batch * item.rows, columns = item.batch * item.columns;
      if (whole) carve(item.sums, 2 + item.batch + rows + columns);
      carve(item.row_factor, rows);
      carve(item.column_factor, columns);
      if (i < a.small) carve_parts(item, carve);
    }
    Carver most = carve;  // large ones use the same memory one after the other
    for (int64_t first = a.small; first < a.count; first = batch_end(a, first)) {
      Carver own = carve;
      const int64_t last = whole ? batch_end(a, first) : a.count;
      for (int64_t i = first; i < last; ++i) carve_parts(a.items[i], own);
      if (own.at > most.at) most = own;
      if (!whole) break;
    }
    carve = most;
  };
  Carver table;
  table(a.items, n);
  table(a.offset, n + 1);
  if (!table.take(Scratch::kTable)) return false;
  table(a.items, n);
  table(a.offset, n + 1);
  for (const bool small : {true, false}) {
    for (int64_t i = 0; i < n; ++i) {
      const bool steps = a.job.call.tensors[i].grad && a.call.shapes[i].whole_numel > 0;
      if (!steps || is_small(i) != small) continue;
      a.items[a.count] = item_of(a, i, a.count > 0 ? &a.items[a.count - 1] : nullptr);
      ++a.count;
    }
    if (small) a.small = a.count;
  }
  a.offset[0] = 0;
  for (int64_t i = 0; i < a.count; ++i) a.offset[i + 1] = a.offset[i] + a.tensor(a.items[i]).numel;
  Carver memory;
  carve_arrays(memory);
  if (!memory.take(Scratch::kFactors)) return false;
  carve_arrays(memory);
  return true;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_adafactor_step(const tt_adafactor_call* call, const tt_parallel* parallel) {
  if (call == nullptr || call->step == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "adafactor: call is NULL");
  }
  tt_status status = check_adafactor(*call);
  if (status != TT_OK) return status;
  Adafactor a{*call, {*call->step}, {}, nullptr, 0, 0, nullptr};
  bool runs = false;
  status = begin_step(a.job, false, parallel, &runs);
  if (status != TT_OK || !runs) return status;
  tt_isa isa;
  status = current_isa(&isa);
  if (status != TT_OK) return status;
  a.kernels = isa >= TT_ISA_AVX512   ? adafactor_kernels_avx512()
              : isa == TT_ISA_SCALAR ? adafactor_kernels_scalar()
                                     : adafactor_kernels_avx2();
  if (!reserve(a)) return set_error(TT_OUT_OF_MEMORY, "adafactor: no memory for the sums");
  if (call->part == TT_ADAFACTOR_WHOLE) {
    step_small(a, parallel);
    for (int64_t first = a.small; first < a.count; first = batch_end(a, first))
      step_large(a, parallel, first, batch_end(a, first), call->part);
  } else {
    step_large(a, parallel, 0, a.count, call->part);
  }
  if (call->part == TT_ADAFACTOR_WHOLE || call->part == TT_ADAFACTOR_UPDATE)
    for (int64_t i = 0; i < call->step->n_tensors; ++i)
      if (call->step->tensors[i].grad) *call->step->tensors[i].step += 1.0f;
  return TT_OK;
}
