// int8_weight_mm: rows into fp32 panels once, then column and row blocks over threads.
#include <trimtab/int8_weight_mm.h>

#include <algorithm>
#include <atomic>

#include "cpu/int8_product.h"
#include "cpu/int8_weight_mm_kernels.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_weight_mm";
// Activation panels of one pass; more rows are done in several passes, so scratch stays bounded.
constexpr int64_t kMaxPanelBytes = int64_t(16) << 20;
// A block of activations that is read again for every column tile: half of a 2 MiB L2.
constexpr int64_t kBlockBytes = int64_t(1) << 20;

const WeightKernel& weight_kernel(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return kWeightAvx512;
  return isa == TT_ISA_SCALAR ? kWeightScalar : kWeightAvx2;
}

struct WeightPass {
  const WeightKernel* kernel;
  const char* x;  // first row
  tt_dtype dtype;
  int64_t x_stride, row_bytes;
  WeightBlock block;  // rows, mr and out are those of the whole pass
  int64_t row_floats; // of a panel row: K rounded up to 4
  int64_t rows_a_task, n_a_task, m_tasks, n_tasks;
  std::atomic<int64_t> next{0};
};

void fill(WeightPass& pass, int64_t panel) {
  const int64_t m = panel * pass.block.mr;
  pass.kernel->fill(pass.x + m * pass.row_bytes, pass.dtype, pass.x_stride,
                    int(std::min(pass.block.mr, pass.block.rows - m)), pass.block.K,
                    const_cast<float*>(pass.block.x) + m * pass.row_floats);
}

void run_task(WeightPass& pass, int64_t task) {
  WeightBlock block = pass.block;
  const int64_t m = task / pass.n_tasks * pass.rows_a_task;
  block.n_begin = task % pass.n_tasks * pass.n_a_task;
  block.n_end = std::min(block.n_begin + pass.n_a_task, block.N);
  block.x += m * pass.row_floats;
  block.rows = std::min(pass.rows_a_task, block.rows - m);
  block.out += m * block.out_stride * block.out_size;
  pass.kernel->block(block);
}

// Row blocks that stay in L2, and column blocks so that every thread gets several and a late one can be
// caught up with.
void plan_tasks(WeightPass& pass, int threads) {
  const WeightBlock& block = pass.block;
  const int64_t fit = std::max<int64_t>(kBlockBytes / 4 / std::max<int64_t>(pass.row_floats, 1), 1);
  pass.m_tasks = (block.rows + fit - 1) / fit;
  pass.rows_a_task = round_up((block.rows + pass.m_tasks - 1) / pass.m_tasks, block.mr);
  pass.m_tasks = (block.rows + pass.rows_a_task - 1) / pass.rows_a_task;
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t n_tasks = std::max<int64_t>((wanted + pass.m_tasks - 1) / pass.m_tasks, 1);
  pass.n_a_task = round_up((block.N + n_tasks - 1) / n_tasks, kWeightTileN);
  pass.n_tasks = (block.N + pass.n_a_task - 1) / pass.n_a_task;
}

// A rough cost in ns decides whether waking threads pays: bytes of weight streamed at 10 GB/s, or
// multiply-adds at a rate a core reaches.
bool worth_threads(tt_isa isa, int64_t M, int64_t N, int64_t K) {
  const double macs_a_ns = isa == TT_ISA_SCALAR ? 0.3 : isa < TT_ISA_AVX512 ? 25 : 50;
  constexpr double kWakeUpNs = 4000;
  return std::max(double(N) * K / 10, double(M) * N * K / macs_a_ns) > kWakeUpNs;
}

void run_pass(WeightPass& pass, const tt_parallel& pool, int threads) {
  const int64_t panels = (pass.block.rows + pass.block.mr - 1) / pass.block.mr;
  // Below this the fill costs less than a second parallel region.
  if (threads > 1 && pass.block.rows * pass.block.K > 96 * 1024) {
    parallel_run(pool, panels, [&](int64_t panel) { fill(pass, panel); });
  } else {
    for (int64_t panel = 0; panel < panels; ++panel) fill(pass, panel);
  }
  plan_tasks(pass, threads);
  const int64_t tasks = pass.m_tasks * pass.n_tasks;
  if (threads == 1 || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) run_task(pass, task);
    return;
  }
  // Tasks are taken from a counter, so a delayed thread takes fewer.
  pass.next.store(0, std::memory_order_relaxed);
  parallel_run(pool, threads, [&](int64_t) {
    for (int64_t task; (task = pass.next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      run_task(pass, task);
  });
}

tt_status check(const void* x, tt_dtype dtype, const int8_t* b_packed, int64_t group, int64_t M,
                int64_t N, int64_t K, const tt_epilogue* epilogue) {
  // K has no bound here: nothing is summed in int32.
  const int64_t bounded = std::min<int64_t>(K, TT_INT8_MAX_K);
  const tt_status status = check_product(kOp, M, N, bounded, b_packed, epilogue);
  if (status != TT_OK) return status;
  if (dtype_size(dtype) == 0 || (x == nullptr && M > 0 && K > 0)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, not NULL", kOp);
  }
  if (group < 1 && K > 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected group_size >= 1, got %lld", kOp,
                     (long long)group);
  }
  if (group < K && group % 4 != 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected group_size to be a multiple of 4, or K=%lld or more, got %lld",
                     kOp, (long long)K, (long long)group);
  }
  return TT_OK;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_weight_mm(const void* x, tt_dtype x_dtype, int64_t x_stride,
                            const int8_t* b_packed, int64_t group, const int8_t* zero_point,
                            int64_t M, int64_t N, int64_t K, const tt_epilogue* epilogue,
                            const tt_parallel* parallel) {
  tt_status status = check(x, x_dtype, b_packed, group, M, N, K, epilogue);
  if (status != TT_OK) return status;
  tt_isa isa;
  status = current_isa(&isa);
  if (status != TT_OK || M == 0 || N == 0) return status;

  WeightPass pass;
  pass.kernel = &weight_kernel(isa);
  pass.dtype = x_dtype;
  pass.x_stride = x_stride;
  pass.row_bytes = x_stride * dtype_size(x_dtype);
  pass.row_floats = round_up(K, 4);
  const int64_t most_rows = std::max<int64_t>(
      kMaxPanelBytes / 4 / std::max<int64_t>(pass.row_floats, 1) / kWeightMr * kWeightMr,
      kWeightMr);
  const int64_t pass_rows = std::min(M, most_rows);
  // Even panels: 9 rows as 5 + 4, not 8 + 1.
  const int64_t panels = (pass_rows + pass.kernel->mr - 1) / pass.kernel->mr;
  const int64_t mr = (pass_rows + panels - 1) / panels;

  const bool own_bias = epilogue->bias == nullptr || epilogue->bias_dtype != TT_F32;
  const int64_t x_bytes = round_up(pass_rows * pass.row_floats * 4, 64) + 64;  // K may be 0
  char* scratch = static_cast<char*>(thread_scratch(x_bytes + (own_bias ? N * 4 : 0)));
  if (scratch == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", kOp,
                     (long long)(x_bytes + N * 4));
  }
  float* bias = reinterpret_cast<float*>(scratch + x_bytes);
  if (own_bias) widen_bias(*epilogue, N, bias);

  pass.block = {reinterpret_cast<float*>(scratch),
                0,
                mr,
                b_packed,
                K,
                N,
                0,
                N,
                std::max<int64_t>(std::min(group, K), 1),
                epilogue->b_scale,
                zero_point,
                own_bias ? bias : static_cast<const float*>(epilogue->bias),
                nullptr,
                epilogue->out_stride,
                dtype_size(epilogue->out_dtype),
                pass.kernel->epilogue(epilogue->activation, epilogue->out_dtype)};
  const tt_parallel pool = pool_or_serial(parallel);
  const int threads = pool.run != nullptr && worth_threads(isa, M, N, K) ? pool.threads : 1;
  for (int64_t m = 0; m < M; m += pass_rows) {
    pass.x = static_cast<const char*>(x) + m * pass.row_bytes;
    pass.block.rows = std::min(pass_rows, M - m);
    pass.block.out =
        static_cast<char*>(epilogue->out) + m * epilogue->out_stride * pass.block.out_size;
    run_pass(pass, pool, threads);
  }
  return TT_OK;
}
