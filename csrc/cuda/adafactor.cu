// adafactor on CUDA: six launches for any number of tensors, seven where a norm is asked for, and nothing waits
// for the host. Each of the three sums (rows and columns, the mean of row_var, the norms of parameter and
// direction) has to be there before the next begins.
//
//   adafactor_norm       partial sums of squares of all gradients, where a norm is asked for
//   adafactor_prepare    the norm, the clip coefficient, whether to skip; constants and step counts
//   adafactor_squares    sums of squares of rows and columns, tile by tile
//   adafactor_average    row_var, col_var, the factors of columns
//   adafactor_factors    the factors of rows
//   adafactor_direction_squares   a vector's variance; the norms
//   adafactor_apply      everything else
//
// Of 24 bytes an element of an fp32 matrix the last two move 20.
#include <trimtab/adafactor.h>

#include <cstring>

#include "cuda/adafactor_update.cuh"
#include "cuda/optim_layout.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "adafactor";

bool steps(const tt_adafactor_call& call, int64_t i) {
  return call.step->tensors[i].grad && call.shapes[i].whole_numel > 0;
}

// How a tensor is cut; where its numbers lie is filled in by layout_of.
AdafactorShape shape_of(const tt_adafactor_call& call, int64_t i) {
  AdafactorShape s = {};
  const tt_adafactor_shape& given = call.shapes[i];
  if (!steps(call, i)) return s;
  s.whole_numel = given.whole_numel;
  s.sums = given.sums_at;
  if (given.batch == 0) return s;
  s.batch = given.batch, s.rows = given.rows, s.columns = given.columns;
  s.whole_rows = given.whole_rows, s.whole_columns = given.whole_columns;
  s.row_tiles = ceil_div(s.rows, kTileRows);
  s.row_blocks = ceil_div(s.columns, kRowBlock);
  const int64_t tile = std::min(s.rows, kTileRows) * s.columns;
  s.tiles = tile > 0 ? std::max(int64_t{1}, kSquareValues / tile) : 1;
  if (s.tiles > kEight) s.tiles = s.tiles / kEight * kEight;  // so that pieces begin aligned
  s.mean_parts = std::max(int64_t{1}, ceil_div(s.rows, kMeanRows));
  s.matrices = s.rows > 0 ? std::max(int64_t{1}, kMeanRows / s.rows) : 1;
  return s;
}

struct Counts {
  int64_t squares, rows, columns;
};

Counts pieces_of(const AdafactorShape& s) {
  if (s.batch == 0) return {};
  const int64_t of_rows = s.mean_parts > 1 ? s.batch * s.mean_parts : ceil_div(s.batch, s.matrices);
  return {ceil_div(s.batch * s.row_tiles, s.tiles) * s.row_blocks, s.rows > 0 ? of_rows : 0,
          ceil_div(s.batch * s.columns, columns_of_piece(s))};
}

// Sizes of table and workspace, a function of the call and the device.
struct Layout {
  int64_t n_pieces = 0, n_blocks = 0, piece = 0;  // piece: tiles
  Counts n = {};
  // Of the table: where its arrays begin, and its end.
  int64_t groups, own_groups, shapes, pieces, blocks, squares, rows, columns, bytes;
  // Of the workspace likewise.
  int64_t constants, sums, param_sums, direction_sums, counts, row_parts, column_parts;
  int64_t row_factor, column_factor, means, workspace;
};

// Numbers of a tensor in the workspace begin at multiples of 64 bytes.
struct Ends {
  int64_t row_parts = 0, column_parts = 0, row_factor = 0, column_factor = 0, means = 0;

  static int64_t take(int64_t& end, int64_t count) {
    const int64_t at = end;
    end += ceil_div(count, 16) * 16;
    return at;
  }
  void place(AdafactorShape& s) {
    const int64_t of_rows = s.batch * s.rows, of_columns = s.batch * s.columns;
    s.row_parts = take(row_parts, s.row_blocks * of_rows);
    s.column_parts = take(column_parts, s.row_tiles * of_columns);
    s.row_factor = take(row_factor, of_rows);
    s.column_factor = take(column_factor, of_columns);
    s.means = take(means, s.batch * s.mean_parts);
  }
};

Layout layout_of(const tt_adafactor_call& call, int sm_count) {
  const tt_optim_call& step = *call.step;
  Layout l;
  Ends ends;
  int64_t tiles = 0;
  for (int64_t i = 0; i < step.n_tensors; ++i) tiles += tiles_of(step.tensors[i]);
  l.piece = tiles_of_a_piece(tiles, sm_count);
  for (int64_t i = 0; i < step.n_tensors; ++i) {
    const tt_optim_tensor& t = step.tensors[i];
    if (!steps(call, i)) continue;
    l.n_pieces += ceil_div(tiles_of(t), l.piece);
    l.n_blocks += ceil_div(t.numel, kNormBlock);
    AdafactorShape s = shape_of(call, i);
    ends.place(s);
    const Counts n = pieces_of(s);
    l.n.squares += n.squares, l.n.rows += n.rows, l.n.columns += n.columns;
  }
  const auto after = [](int64_t at, int64_t count, int64_t size) {
    return ceil_div(at + count * size, 64) * 64;
  };
  l.groups = after(0, step.n_tensors, sizeof(OptimRow));
  l.own_groups = after(l.groups, step.n_groups, sizeof(tt_optim_group));
  l.shapes = after(l.own_groups, step.n_groups, sizeof(tt_adafactor_group));
  l.pieces = after(l.shapes, step.n_tensors, sizeof(AdafactorShape));
  l.blocks = after(l.pieces, l.n_pieces, sizeof(OptimPiece));
  l.squares = after(l.blocks, l.n_blocks, sizeof(OptimPiece));
  l.rows = after(l.squares, l.n.squares, sizeof(OptimPiece));
  l.columns = after(l.rows, l.n.rows, sizeof(OptimPiece));
  l.bytes = after(l.columns, l.n.columns, sizeof(OptimPiece));
  l.constants = after(0, 1, sizeof(OptimFacts));
  l.sums = after(l.constants, step.n_tensors * kConstantFloats, sizeof(float));
  l.param_sums = after(l.sums, l.n_blocks, sizeof(double));
  l.direction_sums = after(l.param_sums, l.n_blocks, sizeof(double));
  l.counts = after(l.direction_sums, l.n_blocks, sizeof(double));
  l.row_parts = after(l.counts, step.n_tensors, sizeof(uint32_t));
  l.column_parts = after(l.row_parts, ends.row_parts, sizeof(double));
  l.row_factor = after(l.column_parts, ends.column_parts, sizeof(float));
  l.column_factor = after(l.row_factor, ends.row_factor, sizeof(float));
  l.means = after(l.column_factor, ends.column_factor, sizeof(float));
  l.workspace = after(l.means, ends.means, sizeof(double));
  return l;
}

OptimRow make_row(const tt_adafactor_call& call, int64_t i) {
  const tt_optim_tensor& t = call.step->tensors[i];
  OptimRow row = {};
  if (t.grad == nullptr) return row;
  const int flat_states = call.shapes[i].batch ? 0 : 1;
  row.param = t.param;
  row.grad = t.grad;
  for (int k = 0; k < 2; ++k) row.state[k] = t.state[k];
  row.ema = t.ema;
  row.copy = t.copy;
  row.mask = t.mask;
  row.master = static_cast<uint16_t*>(t.master);
  row.master_kind = uint8_t(t.master_kind);
  row.step = t.step;
  row.numel = row.body = t.numel;
  row.group = t.group;
  row.param_dtype = t.param_dtype;
  row.grad_dtype = t.grad_dtype;
  row.state_dtype = t.state_dtype;
  row.copy_dtype = t.copy_dtype;
  const int shift = common_shift(t, flat_states);
  row.wide = shift >= 0;
  row.shift = uint8_t(shift > 0 ? shift : 0);
  row.negate = (call.step->groups[t.group].flags & TT_MAXIMIZE) != 0;
  return row;
}

AdafactorParams make_params(const tt_adafactor_call& call, const Layout& l, const void* table,
                            void* work) {
  AdafactorParams p = {};
  p.step = call_params(*call.step);
  p.step.table = {at_byte<OptimRow>(table, 0), at_byte<tt_optim_group>(table, l.groups),
                  at_byte<OptimPiece>(table, l.pieces), at_byte<OptimPiece>(table, l.blocks),
                  nullptr};
  p.groups = at_byte<tt_adafactor_group>(table, l.own_groups);
  p.shapes = at_byte<AdafactorShape>(table, l.shapes);
  p.squares = at_byte<OptimPiece>(table, l.squares);
  p.rows = at_byte<OptimPiece>(table, l.rows);
  p.columns = at_byte<OptimPiece>(table, l.columns);
  p.n_rows_pieces = l.n.rows;
  p.n_columns_pieces = l.n.columns;
  p.step.n_blocks = l.n_blocks;
  p.step.tiles = int32_t(l.piece);
  p.step.facts = at_byte<OptimFacts>(work, 0);
  p.step.constants = at_byte<float>(work, l.constants);
  p.step.sums = at_byte<double>(work, l.sums);
  p.step.param_sums = at_byte<double>(work, l.param_sums);
  p.step.direction_sums = at_byte<double>(work, l.direction_sums);
  p.step.counts = at_byte<uint32_t>(work, l.counts);
  p.row_parts = at_byte<double>(work, l.row_parts);
  p.column_parts = at_byte<float>(work, l.column_parts);
  p.row_factor = at_byte<float>(work, l.row_factor);
  p.column_factor = at_byte<float>(work, l.column_factor);
  p.means = at_byte<double>(work, l.means);
  p.part = call.part;
  p.sums = call.part == TT_ADAFACTOR_WHOLE ? nullptr : call.sums;
  return p;
}

template <class Params>
tt_status run(void (*kernel)(const Params), int64_t blocks, int threads, int shared_bytes,
              const Params& p, tt_stream stream) {
  if (blocks == 0) return TT_OK;
  const LaunchShape shape = {dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes};
  return launch(kOp, kernel, shape, p, stream);
}

// As far as the part goes; each status is that of all launches before.
tt_status run_all(const tt_adafactor_call& call, const Layout& l, const AdafactorParams& p,
                  tt_stream stream) {
  const int part = call.part;
  const bool whole = part == TT_ADAFACTOR_WHOLE, begins = whole || part == TT_ADAFACTOR_SQUARES;
  const int64_t warps = ceil_div(l.n_blocks, kNormThreads / 32);
  const int64_t prepares = ceil_div(call.step->n_tensors, kPrepareThreads);
  constexpr int kSums = kNormSums * int(sizeof(double));
  tt_status status = TT_OK;
  if (begins && p.step.sums_squares)
    status = run(adafactor_norm, warps, kNormThreads, 0, p.step, stream);
  if (begins && status == TT_OK)
    status = run(adafactor_prepare, prepares, kPrepareThreads, kSums, p, stream);
  if (begins && status == TT_OK)
    status = run(adafactor_squares, l.n.squares, kSquareThreads, kSquareShared, p, stream);
  if ((begins || part == TT_ADAFACTOR_AVERAGE) && status == TT_OK)
    status =
        run(adafactor_average, l.n.rows + l.n.columns, kAverageThreads, kAverageShared, p, stream);
  if (part != TT_ADAFACTOR_SQUARES && part != TT_ADAFACTOR_UPDATE && status == TT_OK)
    status = run(adafactor_factors, l.n.rows, kAverageThreads, kAverageShared, p, stream);
  if ((whole || part == TT_ADAFACTOR_DIRECTION) && status == TT_OK)
    status = run(adafactor_direction_squares, warps, kNormThreads, 0, p, stream);
  if ((whole || part == TT_ADAFACTOR_UPDATE) && status == TT_OK)
    status = run(is_compact(*call.step) ? adafactor_apply<true> : adafactor_apply<false>,
                 l.n_pieces, kUpdateThreads, 0, p, stream);
  return status;
}

tt_status checked_layout(const tt_adafactor_call* call, Layout* layout) {
  if (call == nullptr || call->step == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: call is NULL", kOp);
  tt_status status = check_adafactor(*call);
  if (status == TT_OK) status = check_lengths(*call->step, kOp);
  if (status != TT_OK) return status;
  DeviceFacts facts;
  status = device_facts(kOp, &facts);
  if (status == TT_OK) *layout = layout_of(*call, facts.sm_count);
  return status;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_adafactor_sizes_cuda(const tt_adafactor_call* call, int64_t* table,
                                  int64_t* workspace) {
  Layout l;
  const tt_status status = checked_layout(call, &l);
  if (status != TT_OK) return status;
  *table = l.bytes;
  *workspace = l.workspace;
  return TT_OK;
}

tt_status tt_adafactor_table_cuda(const tt_adafactor_call* call, void* table) {
  Layout l;
  const tt_status status = checked_layout(call, &l);
  if (status != TT_OK) return status;
  const tt_optim_call& step = *call->step;
  std::memset(table, 0, size_t(l.bytes));
  if (step.n_groups > 0) {
    const size_t n = size_t(step.n_groups);
    std::memcpy(at_byte<char>(table, l.groups), step.groups, n * sizeof *step.groups);
    std::memcpy(at_byte<char>(table, l.own_groups), call->groups, n * sizeof *call->groups);
  }
  OptimRow* const rows = at_byte<OptimRow>(table, 0);
  AdafactorShape* const shapes = at_byte<AdafactorShape>(table, l.shapes);
  OptimPiece* const first_block = at_byte<OptimPiece>(table, l.blocks);
  OptimPiece *pieces = at_byte<OptimPiece>(table, l.pieces), *blocks = first_block;
  OptimPiece *squares = at_byte<OptimPiece>(table, l.squares),
             *of_rows = at_byte<OptimPiece>(table, l.rows),
             *columns = at_byte<OptimPiece>(table, l.columns);
  const auto list = [](OptimPiece*& to, int64_t row, int64_t count, int64_t stride = 1) {
    for (int64_t k = 0; k < count; ++k) *to++ = {int32_t(row), int32_t(k * stride)};
  };
  Ends ends;
  for (int64_t i = 0; i < step.n_tensors; ++i) {
    rows[i] = make_row(*call, i);
    rows[i].first_block = blocks - first_block;
    shapes[i] = shape_of(*call, i);
    if (!steps(*call, i)) continue;
    ends.place(shapes[i]);
    const Counts n = pieces_of(shapes[i]);
    list(squares, i, n.squares);
    list(of_rows, i, n.rows);
    list(columns, i, n.columns);
    list(pieces, i, ceil_div(tiles_of(step.tensors[i]), l.piece), l.piece);
    list(blocks, i, ceil_div(step.tensors[i].numel, kNormBlock));
  }
  return TT_OK;
}

tt_status tt_adafactor_step_cuda(const tt_adafactor_call* call, const void* table, void* workspace,
                                 tt_stream stream) {
  Layout l;
  const tt_status status = checked_layout(call, &l);
  if (status != TT_OK || call->step->n_tensors == 0) return status;
  return run_all(*call, l, make_params(*call, l, table, workspace), stream);
}
