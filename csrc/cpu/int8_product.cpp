#include "cpu/int8_product.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/status.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

// Activation panels of one pass; more rows are done in several passes, so scratch stays bounded.
constexpr int64_t kMaxPanelBytes = int64_t(16) << 20;
// A block of activations that is read again for every column tile: half of a 2 MiB L2.
constexpr int64_t kBlockBytes = int64_t(1) << 20;

struct Pass {
  const RowSource* source;
  const Int8Kernel* kernel;
  Int8Block block;       // a, a_scale, rows and out are those of the whole pass
  int64_t m_begin, rows; // of this pass
  int64_t panels, panels_a_task, n_a_task, m_tasks, n_tasks;
};

void fill_panel(Pass& pass, int64_t p) {
  const int mr = pass.block.mr;
  const int64_t row = p * mr;
  char* panel = const_cast<char*>(static_cast<const char*>(pass.block.a));
  float* scale = const_cast<float*>(pass.block.a_scale);
  pass.source->fill(pass.source->self, *pass.kernel, pass.m_begin + row,
                    int(std::min<int64_t>(mr, pass.rows - row)),
                    panel + p * pass.block.a_panel_bytes, scale + row);
}

void block_task(Pass& pass, int64_t task) {
  Int8Block block = pass.block;
  const int64_t panel = task / pass.n_tasks * pass.panels_a_task;
  const int64_t row = panel * block.mr;
  block.n_begin = task % pass.n_tasks * pass.n_a_task;
  block.n_end = std::min(block.n_begin + pass.n_a_task, block.N);
  block.a = static_cast<const char*>(block.a) + panel * block.a_panel_bytes;
  block.a_scale += row;
  block.rows = std::min(pass.panels_a_task * block.mr, pass.rows - row);
  block.out += row * block.out_stride * block.out_size;
  pass.kernel->block(block);
}

// Cuts the pass into tasks: row blocks that stay in L2, column blocks so that every thread gets
// several and a late one can be caught up with.
void plan_tasks(Pass& pass, int threads) {
  const int64_t N = pass.block.N;
  const int64_t tall = pass.kernel->tile_panels;
  int64_t panels = std::max<int64_t>(kBlockBytes / pass.block.a_panel_bytes / tall * tall, tall);
  panels = std::min({panels, pass.panels, int64_t(kMaxBlockM) / pass.kernel->mr / tall * tall});
  // Even row blocks: 5 panels as 3 + 2, not 4 + 1.
  pass.m_tasks = (pass.panels + panels - 1) / panels;
  pass.panels_a_task = round_up((pass.panels + pass.m_tasks - 1) / pass.m_tasks, tall);
  pass.m_tasks = (pass.panels + pass.panels_a_task - 1) / pass.panels_a_task;
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t n_tasks = std::max<int64_t>((wanted + pass.m_tasks - 1) / pass.m_tasks, 1);
  pass.n_a_task = round_up((N + n_tasks - 1) / n_tasks, kMaxTileN);
  pass.n_tasks = (N + pass.n_a_task - 1) / pass.n_a_task;
}

// A rough cost in ns decides whether waking threads pays: bytes of weight streamed at 12 GB/s, or
// multiply-adds at a rate a core reaches with that instruction set.
bool worth_threads(const Int8Kernel& kernel, int64_t M, int64_t N, int64_t K) {
  constexpr double kMacsANs[] = {1, 40, 100, 150, 1500};
  const double stream = double(N) * K / 12, macs = double(M) * N * K / kMacsANs[kernel.isa];
  constexpr double kWakeUpNs = 4000;
  return std::max(stream, macs) > kWakeUpNs;
}

void run_pass(Pass& pass, const tt_parallel& parallel, int threads) {
  const int64_t K = pass.block.K;
  // Below this (6 us) the fill costs less than a second parallel region.
  const bool parallel_fill = threads > 1 && pass.rows * K > 24 * 1024;
  if (parallel_fill) {
    parallel_run(parallel, pass.panels, [&](int64_t p) { fill_panel(pass, p); });
  } else {
    for (int64_t p = 0; p < pass.panels; ++p) fill_panel(pass, p);
  }
  plan_tasks(pass, threads);
  const int64_t tasks = pass.m_tasks * pass.n_tasks;
  if (threads == 1 || tasks == 1) {
    for (int64_t t = 0; t < tasks; ++t) block_task(pass, t);
    return;
  }
  Shares shares(tasks, threads);
  parallel_run(parallel, shares.count, [&](int64_t thread) {
    for (int64_t t; (t = shares.take(thread)) >= 0;) block_task(pass, t);
  });
}

}  // namespace

void widen_bias(const tt_epilogue& epilogue, int64_t N, float* bias) {
  if (epilogue.bias == nullptr) {
    std::fill(bias, bias + N, -0.0f);
  } else if (epilogue.bias_dtype == TT_BF16) {
    const bf16* from = static_cast<const bf16*>(epilogue.bias);
    for (int64_t n = 0; n < N; ++n) bias[n] = to_float(from[n]);
  } else {
    const fp16* from = static_cast<const fp16*>(epilogue.bias);
    for (int64_t n = 0; n < N; ++n) bias[n] = to_float(from[n]);
  }
}

int dtype_size(tt_dtype dtype) {
  return dtype == TT_F32 ? 4 : dtype == TT_BF16 || dtype == TT_F16 ? 2 : 0;
}

namespace {

int out_size(tt_dtype dtype) { return dtype == TT_I8 ? 1 : dtype_size(dtype); }

tt_status check_out_scale(const char* op, const tt_epilogue& epilogue, bool int8_out) {
  const bool int8 = epilogue.out_dtype == TT_I8;
  if (int8 && !int8_out) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected out of float32, bfloat16 or float16, got int8", op);
  }
  if (int8 != (epilogue.out_scale != nullptr)) {
    return set_error(
        TT_INVALID_ARGUMENT, "%s: expected %s", op,
        int8 ? "out_scale for int8 out, got NULL" : "out_scale NULL where out is not int8");
  }
  return TT_OK;
}

}  // namespace

tt_status check_product(const char* op, int64_t M, int64_t N, int64_t K, const int8_t* b_packed,
                        const tt_epilogue* epilogue, bool int8_out) {
  if (M < 0 || N < 0 || K < 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld N=%lld K=%lld", op,
                     (long long)M, (long long)N, (long long)K);
  }
  if (K > TT_INT8_MAX_K) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected K <= %d, where the int32 sum is exact, got K=%lld", op,
                     TT_INT8_MAX_K, (long long)K);
  }
  if (epilogue == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: epilogue is NULL", op);
  if (M == 0 || N == 0) return TT_OK;
  if ((b_packed == nullptr && K > 0) || epilogue->b_scale == nullptr || epilogue->out == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "%s: b_packed, b_scale or out is NULL", op);
  }
  if (reinterpret_cast<uintptr_t>(b_packed) % 64 != 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected b_packed aligned to 64 bytes, got %p", op,
                     static_cast<const void*>(b_packed));
  }
  if (out_size(epilogue->out_dtype) == 0 ||
      (epilogue->bias != nullptr && dtype_size(epilogue->bias_dtype) == 0)) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected dtypes float32, bfloat16 or float16", op);
  }
  if (epilogue->activation < TT_ACT_NONE || epilogue->activation > TT_ACT_SILU) {
    return set_error(TT_INVALID_ARGUMENT, "%s: unknown activation %d", op, epilogue->activation);
  }
  if (epilogue->out_stride < N && M > 1) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected out_stride >= N=%lld, got %lld", op,
                     (long long)N, (long long)epilogue->out_stride);
  }
  return check_out_scale(op, *epilogue, int8_out);
}

tt_status run_product(const char* op, const RowSource& source, const int8_t* b_packed, int64_t M,
                      int64_t N, int64_t K, const tt_epilogue& epilogue,
                      const tt_parallel* parallel) {
  tt_isa isa;
  const tt_status status = current_isa(&isa);
  if (status != TT_OK || M == 0 || N == 0) return status;
  const Int8Kernel& kernel = int8_kernel(isa, M, N * K);
  const tt_parallel pool = pool_or_serial(parallel);

  const int64_t panel_bytes =
      std::max<int64_t>(round_up(K, kStepK), kStepK) * kernel.mr * kernel.a_cell;
  const int64_t tall = kernel.tile_panels;
  const int64_t pass_panels = std::max<int64_t>(kMaxPanelBytes / panel_bytes / tall * tall, tall);
  const int64_t pass_rows = std::min(pass_panels * kernel.mr, round_up(M, kernel.mr));
  const bool own_bias = epilogue.bias == nullptr || epilogue.bias_dtype != TT_F32;
  const int64_t a_bytes = round_up(pass_rows / kernel.mr * panel_bytes, 64);
  const int64_t scale_bytes = round_up(pass_rows * 4, 64);
  char* scratch =
      static_cast<char*>(thread_scratch(a_bytes + scale_bytes + (own_bias ? N * 4 : 0)));
  if (scratch == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", op,
                     (long long)(a_bytes + scale_bytes));
  }
  float* bias = reinterpret_cast<float*>(scratch + a_bytes + scale_bytes);
  if (own_bias) widen_bias(epilogue, N, bias);

  Pass pass;
  pass.source = &source;
  pass.kernel = &kernel;
  Int8Block& block = pass.block;
  block = {scratch,
           panel_bytes,
           reinterpret_cast<float*>(scratch + a_bytes),
           0,
           0,
           b_packed,
           K,
           N,
           0,
           N,
           epilogue.b_scale,
           own_bias ? bias : static_cast<const float*>(epilogue.bias),
           epilogue.out_scale == nullptr ? 0.0f : 1.0f / *epilogue.out_scale,
           nullptr,
           epilogue.out_stride,
           out_size(epilogue.out_dtype),
           kernel.epilogue(epilogue.activation, epilogue.out_dtype)};
  const int threads = pool.run != nullptr && worth_threads(kernel, M, N, K) ? pool.threads : 1;
  for (int64_t m = 0; m < M; m += pass_rows) {
    pass.m_begin = m;
    pass.rows = std::min(pass_rows, M - m);
    pass.panels = (pass.rows + kernel.mr - 1) / kernel.mr;
    block.mr = int((pass.rows + pass.panels - 1) / pass.panels);
    block.out = static_cast<char*>(epilogue.out) + m * epilogue.out_stride * block.out_size;
    run_pass(pass, pool, threads);
  }
  return TT_OK;
}

}  // namespace trimtab
