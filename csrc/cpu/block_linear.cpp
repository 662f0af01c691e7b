// block_linear: checks, rows of x into panels, and blocks of rows and outputs over threads.
#include <trimtab/block_linear.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/block_linear.h"
#include "cpu/block_linear_check.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "block_linear";
// Panels that are read again for every group of outputs: half of a 2 MiB L2.
constexpr int64_t kBlockBytes = int64_t(1) << 20;
// What storing an output costs, in multiply-adds.
constexpr int64_t kStoreCost = 48;

BlockKernel block_kernel(tt_isa isa, const tt_block_weight& weight) {
  if (isa == TT_ISA_AMX) {
    const BlockKernel tiles = block_kernel_amx(weight);
    if (tiles.run != nullptr) return tiles;
  }
  if (isa >= TT_ISA_AVX512) return block_kernel_avx512(weight);
  return isa == TT_ISA_SCALAR ? block_kernel_scalar(weight) : block_kernel_avx2(weight);
}

struct Pass {
  const char* x;
  tt_dtype dtype;
  int64_t x_stride, row_bytes;
  BlockKernel kernel;
  BlockTask all;  // every row of blocks, every panel; x where the panels stand, if they are shared
  float* a_scale;
  int64_t panels, panels_a_task, m_tasks, n_tasks;
  bool own_panels;  // a task fills its panels itself, for all outputs
};

void fill(const Pass& pass, int64_t panel, char* to) {
  const int64_t m = panel * kSparseM, K = pass.all.weight->K;
  pass.all.out->lanes->fill(pass.x + m * pass.row_bytes, pass.dtype, pass.x_stride,
                            int(std::min<int64_t>(kSparseM, pass.all.rows - m)), K,
                            pass.kernel.cell, to, pass.a_scale + m);
  // The last block may reach beyond the steps that K fills: x is 0 there.
  const int64_t filled = panel_steps(K, pass.kernel.cell) * kSparseStepBytes;
  std::memset(to + filled, pass.kernel.cell == PanelCell::kUint8 ? 0x80 : 0,
              size_t(pass.all.panel_bytes - filled));
}

// Rows of blocks before part `part` of `parts`: equal costs, at the border of a group.
int64_t split_rows(const tt_block_weight& w, int64_t part, int64_t parts) {
  const int64_t rows = (w.N + w.bn - 1) / w.bn, step = group_rows(w);
  if (part >= parts) return rows;
  const auto cost = [&](int64_t row) {
    return double(w.crow[row]) * double(w.bn * w.bk) + double(row * w.bn * kStoreCost);
  };
  const double wanted = cost(rows) * double(part) / double(parts);
  int64_t low = 0, high = (rows + step - 1) / step;  // in groups
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(std::min(middle * step, rows)) < wanted) low = middle + 1;
    else high = middle;
  }
  return std::min(low * step, rows);
}

// False: no memory for scratch.
bool run_task(const Pass& pass, int64_t index) {
  const int64_t panel = index / pass.n_tasks * pass.panels_a_task, part = index % pass.n_tasks;
  BlockTask task = pass.all;
  task.row_begin = split_rows(*task.weight, part, pass.n_tasks);
  task.row_end = split_rows(*task.weight, part + 1, pass.n_tasks);
  task.m = panel * kSparseM;
  task.rows = std::min(pass.panels_a_task * kSparseM, pass.all.rows - task.m);
  if (pass.own_panels) {
    const int64_t count = (task.rows + kSparseM - 1) / kSparseM;
    char* own = static_cast<char*>(thread_scratch(count * task.panel_bytes, Scratch::kSparse));
    if (own == nullptr) return false;
    for (int64_t p = 0; p < count; ++p) fill(pass, panel + p, own + p * task.panel_bytes);
    task.x = own;
  } else {
    task.x += panel * task.panel_bytes;
  }
  return task.row_begin >= task.row_end || pass.kernel.run(task);
}

// Blocks of panels that stay in L2. Where there are enough of them for all threads, a task fills its own:
// x then passes through memory once. Else all fill first, and outputs are shared out too, several tasks a
// thread, so that a late one can be caught up with.
void plan_tasks(Pass& pass, int threads) {
  constexpr int64_t kTall = kBlockPanels;
  const int64_t fit = std::max<int64_t>(kBlockBytes / pass.all.panel_bytes / kTall * kTall, kTall);
  pass.m_tasks = (pass.panels + fit - 1) / fit;
  if (pass.m_tasks >= 2 * threads || (threads == 1 && pass.m_tasks > 1)) {
    pass.own_panels = true;
    pass.m_tasks = round_up(pass.m_tasks, threads);
    pass.n_tasks = 1;
  } else {
    pass.own_panels = false;
    const int64_t wanted = threads == 1 ? 1 : 4 * threads;
    pass.n_tasks = (wanted + pass.m_tasks - 1) / std::max<int64_t>(pass.m_tasks, 1);
  }
  const int64_t even = (pass.panels + pass.m_tasks - 1) / pass.m_tasks;
  pass.panels_a_task = round_up(even, std::min<int64_t>(kTall, even));
  pass.m_tasks = (pass.panels + pass.panels_a_task - 1) / pass.panels_a_task;
}

bool run_pass(const Pass& pass, const tt_parallel& pool, int threads) {
  char* shared = const_cast<char*>(pass.all.x);
  if (!pass.own_panels) {
    const auto fill_shared = [&](int64_t p) { fill(pass, p, shared + p * pass.all.panel_bytes); };
    // Below this the fill costs less than a second parallel region.
    if (threads > 1 && pass.panels > 1 && pass.all.rows * pass.all.weight->K > 64 * 1024) {
      parallel_run(pool, pass.panels, fill_shared);
    } else {
      for (int64_t p = 0; p < pass.panels; ++p) fill_shared(p);
    }
  }
  Shares shares(pass.m_tasks * pass.n_tasks, threads);
  std::atomic<bool> done{true};
  parallel_run(pool, shares.count, [&](int64_t thread) {
    for (int64_t task; (task = shares.take(thread)) >= 0;)
      if (!run_task(pass, task)) done.store(false, std::memory_order_relaxed);
  });
  return done.load();
}

// A rough cost in ns decides whether waking threads pays: bytes of weight streamed at 12 GB/s, or
// multiply-adds at a rate a core reaches.
bool worth_threads(tt_isa isa, const tt_block_weight& w, int64_t M) {
  constexpr double kMacsANs[] = {1, 15, 15, 50, 200};
  constexpr double kWakeUpNs = 4000;
  const double weights = double(w.blocks) * double(w.bn * w.bk);
  return std::max(weights / 8, weights * double(M) / kMacsANs[isa]) > kWakeUpNs;
}

int64_t bytes_of_panel(const tt_block_weight& w, PanelCell cell) {
  const int64_t reach = (w.K + w.bk - 1) / w.bk * w.bk;
  return std::max<int64_t>(panel_steps(reach, cell), 1) * kSparseStepBytes;
}

}  // namespace

tt_status run_block_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                           const tt_block_weight& weight, int64_t M, const tt_epilogue& epilogue,
                           const tt_parallel* parallel) {
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK || M == 0 || weight.N == 0) return status;
  const tt_parallel pool = pool_or_serial(parallel);
  const int threads = pool.run != nullptr && worth_threads(isa, weight, M) ? pool.threads : 1;

  Pass pass;
  pass.kernel = block_kernel(isa, weight);
  pass.panels = (M + kSparseM - 1) / kSparseM;
  pass.all.panel_bytes = bytes_of_panel(weight, pass.kernel.cell);
  plan_tasks(pass, threads);
  const bool own_bias = epilogue.bias == nullptr || epilogue.bias_dtype != TT_F32;
  const int64_t x_bytes = pass.own_panels ? 0 : pass.panels * pass.all.panel_bytes;
  const int64_t scale_bytes = pass.panels * kSparseM * 4;
  char* scratch =
      static_cast<char*>(thread_scratch(x_bytes + scale_bytes + (own_bias ? weight.N * 4 : 0)));
  if (scratch == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", kOp,
                     (long long)(x_bytes + scale_bytes + weight.N * 4));
  }
  float* bias = reinterpret_cast<float*>(scratch + x_bytes + scale_bytes);
  if (own_bias) widen_bias(epilogue, weight.N, bias);

  pass.x = static_cast<const char*>(x);
  pass.dtype = x_dtype;
  pass.x_stride = x_stride;
  pass.row_bytes = x_stride * dtype_size(x_dtype);
  pass.a_scale = reinterpret_cast<float*>(scratch + x_bytes);
  const SparseOutput output =
      sparse_output(isa, epilogue, weight.dtype == TT_I8, pass.a_scale,
                    own_bias ? bias : static_cast<const float*>(epilogue.bias));
  pass.all.weight = &weight;
  pass.all.row_begin = 0;
  pass.all.row_end = (weight.N + weight.bn - 1) / weight.bn;
  pass.all.x = scratch;
  pass.all.m = 0;
  pass.all.rows = M;
  pass.all.out = &output;
  pass.all.pairs = epilogue.out_dtype == TT_BF16 && epilogue.activation == TT_ACT_NONE &&
                   epilogue.out_stride % 2 == 0;
  if (!run_pass(pass, pool, threads))
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch in a thread", kOp);
  return TT_OK;
}

}  // namespace trimtab

using namespace trimtab;

tt_status tt_block_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                          const tt_block_weight* weight, int64_t M, const tt_epilogue* epilogue,
                          const tt_parallel* parallel) {
  tt_status status = check_block_weight(kOp, weight, M, true);
  if (status == TT_OK) status = check_block_input(kOp, x, x_dtype, *weight, M);
  if (status == TT_OK)
    status = check_sparse_epilogue(kOp, epilogue, weight->dtype == TT_I8, M, weight->N);
  if (status != TT_OK) return status;
  return run_block_linear(x, x_dtype, x_stride, *weight, M, *epilogue, parallel);
}
