// optim_step on CUDA: two or three launches for any number of tensors, and nothing waits for the host.
//
//   optim_norm      partial sums of squares of the gradients, where a norm is asked for
//   optim_prepare   the norm, the clip coefficient, whether to skip; each tensor's constants and step count
//   optim_update    everything else
//
// LAMB has optim_probe before the update: the norms of each tensor and of its direction. Where a norm of all
// gradients is asked for too, optim_norm_and_constants is the first launch and the probe adds up.
#include <trimtab/optim_squares.h>

#include <algorithm>
#include <cstring>

#include "cpu/optim_rules.h"
#include "cuda/launch.cuh"
#include "cuda/optim_layout.cuh"
#include "cuda/optim_prepare.cuh"
#include "cuda/optim_probe.cuh"
#include "cuda/optim_step.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "optim_step";

tt_status check(const tt_optim_call& call) {
  if (call.rule < 0 || call.rule >= TT_RULES)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a tt_rule, got %d", kOp, call.rule);
  const OptimRule& rule = optim_rule(tt_rule(call.rule));
  const tt_status status =
      check_call(call, kOp, [&rule](const tt_optim_tensor& t, const tt_optim_group& g) {
        const int states = rule.states(rule.variant(g, t.fresh != 0));
        return OptimNeeds{rule.counts_steps, rule.has_product, states, true};
      });
  return status == TT_OK ? check_lengths(call, kOp) : status;
}

OptimRow make_row(const tt_optim_call& call, const tt_optim_tensor& t) {
  OptimRow row = {};
  if (t.grad == nullptr) return row;
  const OptimRule& rule = optim_rule(tt_rule(call.rule));
  const int variant = rule.variant(call.groups[t.group], t.fresh != 0);
  const int tail = variant | (call.torch_tails ? rule.tail : 0);
  const int states = rule.states(variant);
  // Of torch's vectors. Where a scale spans the tail there is none.
  const int64_t lanes = 32 / bytes_of(arithmetic_dtype(t.param_dtype, t.master_kind));
  const bool whole = tail == variant || t.state_dtype == TT_DYNAMIC8;
  row.param = t.param;
  row.grad = t.grad;
  for (int k = 0; k < states; ++k) row.state[k] = t.state[k];
  row.ema = t.ema;
  row.copy = t.copy;
  row.mask = t.mask;
  for (int k = 0; k < states; ++k) row.scale[k] = t.scale[k];
  row.master = static_cast<uint16_t*>(t.master);
  row.master_kind = uint8_t(t.master_kind);
  row.signs = uint8_t(rule.signs);
  row.step = t.step;
  row.product = t.product;
  row.numel = t.numel;
  row.body = whole ? t.numel : t.numel / lanes * lanes;
  row.group = t.group;
  row.param_dtype = t.param_dtype;
  row.grad_dtype = t.grad_dtype;
  row.state_dtype = t.state_dtype;
  row.copy_dtype = t.copy_dtype;
  row.variant = uint8_t(variant);
  row.tail = uint8_t(tail);
  row.states = uint8_t(states);
  const int shift = common_shift(t, states);
  row.wide = shift >= 0;
  row.shift = uint8_t(shift > 0 ? shift : 0);
  row.negate = (call.groups[t.group].flags & TT_MAXIMIZE) != 0;
  return row;
}

// Sizes of table and workspace, a function of the call and the device.
struct Layout {
  int64_t n_pieces = 0, n_blocks = 0, piece = 0, sm_count = 0;  // piece: tiles
  int64_t groups, pieces, blocks, codes,
      bytes;  // of the table: where its arrays begin, and its end
  int64_t constants, sums, param_sums, direction_sums, counts, workspace;
};

Layout layout_of(const tt_optim_call& call, int sm_count) {
  Layout l;
  int64_t tiles = 0;
  for (int64_t i = 0; i < call.n_tensors; ++i) tiles += tiles_of(call.tensors[i]);
  l.sm_count = sm_count;
  l.piece = tiles_of_a_piece(tiles, sm_count);
  for (int64_t i = 0; i < call.n_tensors; ++i) {
    const tt_optim_tensor& t = call.tensors[i];
    if (t.grad == nullptr) continue;
    l.n_pieces += ceil_div(tiles_of(t), l.piece);
    l.n_blocks += ceil_div(t.numel, kNormBlock);
  }
  const auto after = [](int64_t at, int64_t count, int64_t size) {
    return ceil_div(at + count * size, 64) * 64;
  };
  l.groups = after(0, call.n_tensors, sizeof(OptimRow));
  l.pieces = after(l.groups, call.n_groups, sizeof(tt_optim_group));
  l.blocks = after(l.pieces, l.n_pieces, sizeof(OptimPiece));
  l.codes = after(l.blocks, l.n_blocks, sizeof(OptimPiece));
  l.bytes = after(l.codes, 2, sizeof(DynamicCode));
  l.constants = after(0, 1, sizeof(OptimFacts));
  l.sums = after(l.constants, call.n_tensors * kConstantFloats, sizeof(float));
  const int64_t probed = optim_rule(tt_rule(call.rule)).probe ? 1 : 0;
  l.param_sums = after(l.sums, l.n_blocks, sizeof(double));
  l.direction_sums = after(l.param_sums, probed * l.n_blocks, sizeof(double));
  l.counts = after(l.direction_sums, probed * l.n_blocks, sizeof(double));
  l.workspace = after(l.counts, probed * call.n_tensors, sizeof(uint32_t));
  return l;
}

OptimTable table_at(const Layout& l, const void* base) {
  return {at_byte<OptimRow>(base, 0), at_byte<tt_optim_group>(base, l.groups),
          at_byte<OptimPiece>(base, l.pieces), at_byte<OptimPiece>(base, l.blocks),
          at_byte<DynamicCode>(base, l.codes)};
}

OptimParams make_params(const tt_optim_call& call, const Layout& l, const void* table, void* work) {
  OptimParams p = call_params(call);
  p.n_blocks = l.n_blocks;
  p.tiles = int32_t(l.piece);
  p.table = table_at(l, table);
  p.facts = at_byte<OptimFacts>(work, 0);
  p.constants = at_byte<float>(work, l.constants);
  p.sums = at_byte<double>(work, l.sums);
  if (optim_rule(tt_rule(call.rule)).probe) {
    p.param_sums = at_byte<double>(work, l.param_sums);
    p.direction_sums = at_byte<double>(work, l.direction_sums);
    p.counts = at_byte<uint32_t>(work, l.counts);
  }
  p.probe_prepares = p.counts != nullptr && p.sums_squares && l.n_blocks > 0;
  return p;
}

using Kernel = void (*)(const OptimParams);

struct Update {
  Kernel kernel;
  int shared_bytes;
};

template <class Family>
Update pick(bool compact) {
  if (compact) return {optim_update<Family, true>, compact_shared(Family::kStates)};
  return {optim_update<Family, false>, 0};
}

Update update_kernel(int rule, bool compact) {
  switch (rule) {
    case TT_SGD: return pick<RuleFamily<Sgd, kSgdVariants, 1>>(compact);
    case TT_ADAM: return pick<RuleFamily<Adam, kAdamVariants, 3>>(compact);
    case TT_ADAGRAD: return pick<RuleFamily<Adagrad, kAdagradVariants, 1>>(compact);
    case TT_RMSPROP: return pick<RuleFamily<Rmsprop, kRmspropVariants, 3>>(compact);
    case TT_NADAM: return pick<RuleFamily<Nadam, kNadamVariants, 2>>(compact);
    case TT_RADAM: return pick<RuleFamily<Radam, kRadamVariants, 2>>(compact);
    case TT_ADAMAX: return pick<RuleFamily<Adamax, kAdamaxVariants, 2>>(compact);
    case TT_LION: return pick<RuleFamily<Lion, kLionVariants, 1>>(compact);
    case TT_LAMB: return pick<RuleFamily<Lamb, 1, 2>>(compact);
    default: return {nullptr, 0};
  }
}

// One launch without a norm and without a probe, else two.
tt_status before_update(const tt_optim_call& call, const Layout& l, const OptimParams& p,
                        tt_stream stream) {
  const auto shape = [](int64_t blocks, int threads, int shared_bytes) {
    return LaunchShape{dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes};
  };
  constexpr int kSums = kNormSums * int(sizeof(double));
  const int64_t norm_grid =
      ceil_div(l.n_blocks, kNormThreads / 32);  // a warp a block of kNormBlock
  const int64_t probe_grid = p.probe_prepares ? std::min(norm_grid, 4 * l.sm_count) : norm_grid;
  tt_status status = TT_OK;
  if (p.probe_prepares) {
    const int64_t grid = norm_grid + ceil_div(call.n_tensors, kNormThreads);
    status = launch(kOp, optim_norm_and_constants, shape(grid, kNormThreads, 0), p, stream);
  } else {
    if (p.sums_squares && l.n_blocks > 0)
      status = launch(kOp, optim_norm, shape(norm_grid, kNormThreads, 0), p, stream);
    const int64_t grid = ceil_div(call.n_tensors, kPrepareThreads);
    if (status == TT_OK)
      status = launch(kOp, optim_prepare, shape(grid, kPrepareThreads, kSums), p, stream);
  }
  if (status != TT_OK || p.counts == nullptr || l.n_blocks == 0) return status;
  return launch(kOp, optim_probe, shape(probe_grid, kNormThreads, std::max(kCompactTables, kSums)),
                p, stream);
}

tt_status run_update(const tt_optim_call& call, const Layout& l, const OptimParams& p,
                     tt_stream stream) {
  if (l.n_pieces == 0) return TT_OK;
  const Update update = update_kernel(call.rule, is_compact(call));
  const LaunchShape shape = {dim3(unsigned(l.n_pieces)), dim3(kUpdateThreads), update.shared_bytes};
  return launch(kOp, update.kernel, shape, p, stream);
}

tt_status checked_layout(const tt_optim_call* call, Layout* layout) {
  if (call == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: call is NULL", kOp);
  tt_status status = check(*call);
  if (status != TT_OK) return status;
  DeviceFacts facts;
  status = device_facts(kOp, &facts);
  if (status == TT_OK) *layout = layout_of(*call, facts.sm_count);
  return status;
}

// Of a step in parts.
tt_status checked_parts(const tt_optim_call* call, const double* squares, Layout* layout) {
  const tt_status status = checked_layout(call, layout);
  if (status != TT_OK) return status;
  if (!optim_rule(tt_rule(call->rule)).probe || squares == nullptr || call->max_norm >= 0.0 ||
      call->skip_nonfinite)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a rule that steps by norms, squares, and neither clipping nor "
                     "skip_nonfinite, where the step is made in parts",
                     kOp);
  return TT_OK;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_optim_step_sizes_cuda(const tt_optim_call* call, int64_t* table, int64_t* workspace) {
  Layout l;
  const tt_status status = checked_layout(call, &l);
  if (status != TT_OK) return status;
  *table = l.bytes;
  *workspace = l.workspace;
  return TT_OK;
}

tt_status tt_optim_step_table_cuda(const tt_optim_call* call, void* table) {
  Layout l;
  const tt_status status = checked_layout(call, &l);
  if (status != TT_OK) return status;
  std::memset(table, 0, size_t(l.bytes));
  const OptimTable to = table_at(l, table);
  if (call->n_groups > 0)
    std::memcpy(to.groups, call->groups, size_t(call->n_groups) * sizeof *call->groups);
  to.codes[0] = DynamicTable<false>::code;
  to.codes[1] = DynamicTable<true>::code;
  OptimPiece *pieces = to.pieces, *blocks = to.blocks;
  for (int64_t i = 0; i < call->n_tensors; ++i) {
    const tt_optim_tensor& t = call->tensors[i];
    to.rows[i] = make_row(*call, t);
    to.rows[i].first_block = blocks - to.blocks;
    for (int64_t tile = 0; tile < tiles_of(t); tile += l.piece)
      *pieces++ = {int32_t(i), int32_t(tile)};
    if (t.grad == nullptr) continue;
    for (int64_t block = 0; block < ceil_div(t.numel, kNormBlock); ++block)
      *blocks++ = {int32_t(i), int32_t(block)};
  }
  return TT_OK;
}

tt_status tt_optim_step_cuda(const tt_optim_call* call, const void* table, void* workspace,
                             tt_stream stream) {
  Layout l;
  tt_status status = checked_layout(call, &l);
  if (status != TT_OK || call->n_tensors == 0) return status;
  const OptimParams p = make_params(*call, l, table, workspace);
  status = before_update(*call, l, p, stream);
  return status == TT_OK ? run_update(*call, l, p, stream) : status;
}

tt_status tt_optim_squares_cuda(const tt_optim_call* call, const void* table, void* workspace,
                                double* squares, tt_stream stream) {
  Layout l;
  const tt_status status = checked_parts(call, squares, &l);
  if (status != TT_OK || call->n_tensors == 0) return status;
  OptimParams p = make_params(*call, l, table, workspace);
  p.squares = squares;
  return before_update(*call, l, p, stream);
}

tt_status tt_optim_step_by_cuda(const tt_optim_call* call, const void* table, void* workspace,
                                const double* squares, tt_stream stream) {
  Layout l;
  tt_status status = checked_parts(call, squares, &l);
  if (status != TT_OK || call->n_tensors == 0) return status;
  OptimParams p = make_params(*call, l, table, workspace);
  p.squares = const_cast<double*>(squares);
  const int64_t grid = ceil_div(call->n_tensors, kNormThreads);
  status = launch(kOp, optim_adapt, {dim3(unsigned(grid)), dim3(kNormThreads), 0}, p, stream);
  return status == TT_OK ? run_update(*call, l, p, stream) : status;
}
