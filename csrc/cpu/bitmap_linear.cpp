// bitmap_linear: rows of x into transposed panels once, then blocks of columns over threads.
#include <trimtab/bitmap_linear.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/bitmap_kernels.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/status.h"

namespace trimtab {

namespace {

void row_f32(tt_isa, const void* x, tt_dtype, int64_t K, void* to, float*) {
  std::memcpy(to, x, size_t(K) * 4);
  std::memset(static_cast<float*>(to) + K, 0, size_t(round_up(K, 64) - K) * 4);
}

void row_bf16(tt_isa, const void* x, tt_dtype, int64_t K, void* to, float*) {
  bitmap_row_bf16_avx512(x, K, to);
}

void row_plain16(tt_isa, const void* x, tt_dtype, int64_t K, void* to, float*) {
  std::memcpy(to, x, size_t(K) * 2);
  std::memset(static_cast<uint16_t*>(to) + K, 0, size_t(round_up(K, 64) - K) * 2);
}

void row_int8(tt_isa isa, const void* x, tt_dtype dtype, int64_t K, void* to, float* scale) {
  quantize_row(isa)(x, dtype, K, static_cast<int8_t*>(to), scale);
  std::memset(static_cast<int8_t*>(to) + K, 0, size_t(round_up(K, 64) - K));
}

}  // namespace

BitmapKernel bitmap_kernel(tt_isa isa, const tt_bitmap& weight, int64_t M, int64_t N, int64_t K,
                           bool finite) {
  const tt_dtype dtype = weight.dtype;
  // Panels of x that stay in a 2 MiB L2, since every 32 rows of the weight pass over all of them.
  constexpr int64_t kInL2 = 1280 << 10;
  if (isa >= TT_ISA_AVX512 && has_avx512_vbmi2() && K > 0) {
    // Up to how many rows of x dot products are faster than tiles (short ones lose by the sums of their
    // lanes), or than what serves without tiles: for bf16 the walk, whose time falls with the kept weights.
    // The more weights are kept, the more reading them is the cost, and one stream is read fastest.
    const bool tiles = isa == TT_ISA_AMX && (dtype == TT_I8 || has_amx_bf16());
    const int64_t eighths = weight.count * 8 / (N * K);
    const int64_t most8 = tiles ? std::min<int64_t>(eighths + 1, 4) : kBitmapDotRows;
    const int64_t most16 = tiles ? 1 : weight.count > N * K / 5 ? kBitmapDotRows : 4;
    const bool pays = !tiles || (K > (eighths < 3 ? 512 : 256) && K >= (M - 1) * 1024);
    if (dtype == TT_I8 && pays && M <= most8)
      return {PanelCell::kInt8, bitmap_dots_int8_vbmi2_avx512, true, kInL2, row_int8};
    if (dtype == TT_BF16 && finite && pays && M <= most16)
      return {PanelCell::kF32, bitmap_dots_bf16_vbmi2_avx512, true, kInL2, row_bf16};
  }
  if (isa == TT_ISA_AMX && has_avx512_vbmi2() && K > 0) {
    // For few rows of x a panel as narrow: its lines come from L2 for every 16 rows of the weight.
    const int cols = M <= 4 ? 4 : M <= 8 ? 8 : 0;
    const BitmapRowFn row = cols == 0 ? nullptr : dtype == TT_I8 ? row_int8 : row_plain16;
    if (dtype == TT_BF16 && has_amx_bf16() && finite)
      return {PanelCell::kBf16, bitmap_block_bf16_amx, true, kInL2, row, cols};
    if (dtype == TT_I8) return {PanelCell::kInt8, bitmap_block_int8_amx, true, kInL2, row, cols};
  }
  if (dtype == TT_I8) return {PanelCell::kInt8, nullptr};  // bitmap_int8_expanded
  if (dtype == TT_F32 && isa >= TT_ISA_AVX512 && M <= kBitmapDotRows && finite)
    return {PanelCell::kF32, bitmap_dots_f32_avx512, true, kInL2, row_f32};
  // By dtype, then scalar, AVX2, AVX-512.
  constexpr BitmapBlockFn kBlocks[3][3] = {
      {bitmap_block_f32_scalar, bitmap_block_f32_avx2, bitmap_block_f32_avx512},
      {bitmap_block_bf16_scalar, bitmap_block_bf16_avx2, bitmap_block_bf16_avx512},
      {bitmap_block_f16_scalar, bitmap_block_f16_avx2, bitmap_block_f16_avx512},
  };
  const int column = isa >= TT_ISA_AVX512 ? 2 : isa == TT_ISA_SCALAR ? 0 : 1;
  BitmapKernel kernel{PanelCell::kF32, kBlocks[dtype == TT_F32    ? 0
                                               : dtype == TT_BF16 ? 1
                                                                  : 2][column]};
  if (column > 0) kernel.own_panels = column == 2 ? 8 : 4;  // whose sums take half of the registers
  return kernel;
}

namespace {

constexpr const char* kOp = "bitmap_linear";

struct Pass {
  tt_isa isa;
  const char* x;  // first row
  tt_dtype dtype;
  int64_t x_stride, row_bytes;
  BitmapKernel kernel;
  BitmapBlock block;
  SparseOutput output;
  float* a_scale;
};

// rows [count][dwords] -> to [dwords][kCols]; past the last row that one again
template <int kCols>
void interleave(const uint32_t* rows, int64_t count, int64_t dwords, uint32_t* __restrict to) {
  const uint32_t* row[kCols];
  for (int64_t m = 0; m < kCols; ++m) row[m] = rows + std::min(m, count - 1) * dwords;
  for (int64_t i = 0; i < dwords; ++i)
    for (int m = 0; m < kCols; ++m) to[i * kCols + m] = row[m][i];
}

void fill_rows(const Pass& pass) {
  const int64_t row_bytes = pass.block.panel_bytes, cols = pass.kernel.cols;
  char* panel = static_cast<char*>(const_cast<void*>(pass.block.x));
  char* rows = panel + cols * row_bytes;
  for (int64_t m = 0; m < pass.block.rows; ++m)
    pass.kernel.row(pass.isa, pass.x + m * pass.row_bytes, pass.dtype, pass.block.K,
                    rows + m * row_bytes, pass.a_scale + m);
  if (cols == 0) return;
  const auto turn = cols == 4 ? interleave<4> : interleave<8>;
  turn(reinterpret_cast<const uint32_t*>(rows), pass.block.rows, row_bytes / 4,
       reinterpret_cast<uint32_t*>(panel));
}

void fill(Pass& pass, int64_t panel) {
  const int64_t m = panel * kSparseM;
  char* to = static_cast<char*>(const_cast<void*>(pass.block.x)) + panel * pass.block.panel_bytes;
  pass.output.lanes->fill(pass.x + m * pass.row_bytes, pass.dtype, pass.x_stride,
                          int(std::min<int64_t>(kSparseM, pass.block.rows - m)), pass.block.K,
                          pass.kernel.cell, to, pass.a_scale + m);
}

// task(i, block) for every task, with a copy of pass.block; false: no memory for scratch in a thread.
template <class Task>
bool run_tasks(const Pass& pass, int64_t tasks, const tt_parallel& pool, int threads, Task&& task) {
  Shares shares(tasks, threads);
  std::atomic<bool> done{true};
  parallel_run(pool, shares.count, [&](int64_t thread) {
    BitmapBlock block = pass.block;
    for (int64_t i; (i = shares.take(thread)) >= 0;)
      if (!task(i, block)) done.store(false, std::memory_order_relaxed);
  });
  return done.load();
}

// Kernels that make their own panels: a task is a group of these by a tile of the weight's rows. Where tasks
// are few there are as many for every thread: narrower groups cost the walk less than a tile's panels twice.
bool run_own(Pass& pass, int64_t N, const tt_parallel& pool, int threads) {
  const int64_t M = pass.block.rows, panels = (M + kSparseM - 1) / kSparseM;
  const int64_t most = pass.kernel.own_panels;
  int64_t groups = (panels + most - 1) / most;
  int64_t tiles = (N + kBitmapWalkRows - 1) / kBitmapWalkRows;
  const int64_t tasks = groups * tiles, even = round_up(tasks, threads);
  if (tasks < 4 * threads && tasks != even) {
    if (tiles == 1 && panels * 8 >= even * most * 5) groups = even;
    else if (tiles > 1 || tasks < threads) tiles = (even + groups - 1) / groups;
  }
  const int64_t m_a_task = (panels + groups - 1) / groups * kSparseM;
  const int64_t n_a_task = round_up((N + tiles - 1) / tiles, 16);
  groups = (M + m_a_task - 1) / m_a_task;
  tiles = (N + n_a_task - 1) / n_a_task;
  return run_tasks(pass, groups * tiles, pool, threads, [&](int64_t task, BitmapBlock& block) {
    const int64_t m = task % groups * m_a_task;  // the tile's weights stay in L2 for all groups
    block.x = pass.x + m * pass.row_bytes;
    block.rows = std::min(m_a_task, M - m);
    block.n_begin = task / groups * n_a_task;
    block.n_end = std::min(block.n_begin + n_a_task, N);
    SparseOutput output = pass.output;
    output.out += m * output.out_stride * output.out_size;
    return pass.kernel.block(block, output);
  });
}

bool run_pass(Pass& pass, int64_t N, const tt_parallel& pool, int threads) {
  const int64_t panels = (pass.block.rows + kSparseM - 1) / kSparseM;
  // Below this the fill costs less than a second parallel region.
  constexpr int64_t kWorthFilling = 64 * 1024;
  if (pass.kernel.row != nullptr) {
    fill_rows(pass);
  } else if (threads > 1 && panels > 1 && pass.block.rows * pass.block.K > kWorthFilling) {
    parallel_run(pool, panels, [&](int64_t panel) { fill(pass, panel); });
  } else {
    for (int64_t panel = 0; panel < panels; ++panel) fill(pass, panel);
  }
  // Several tasks a thread, so that a late one can be caught up with.
  const int64_t wanted = threads == 1 ? 1 : 8 * threads;
  const int64_t n_a_task = round_up((N + wanted - 1) / wanted, kSparseTileN);
  const int64_t tasks = (N + n_a_task - 1) / n_a_task;
  return run_tasks(pass, tasks, pool, threads, [&](int64_t task, BitmapBlock& block) {
    block.n_begin = task * n_a_task;
    block.n_end = std::min(block.n_begin + n_a_task, N);
    return pass.kernel.block(block, pass.output);
  });
}

// A rough cost in ns decides whether waking threads pays: bytes of bits and values streamed at 10 GB/s, or
// multiply-adds at a rate a core reaches, or what it takes to fill panels.
bool worth_threads(tt_isa isa, const tt_bitmap& weight, int64_t M, int64_t N, int64_t K) {
  const double macs_a_ns = isa == TT_ISA_SCALAR ? 1 : isa < TT_ISA_AVX512 ? 10 : 30;
  constexpr double kWakeUpNs = 4000;
  const double streamed = double(N) * tt_bitmap_row_bytes(K) / 4, filled = double(M) * K / 8;
  return std::max({streamed, filled, double(M) * weight.count / macs_a_ns}) > kWakeUpNs;
}

tt_status check_weight(const tt_bitmap* weight, tt_dtype x_dtype, int64_t N, int64_t K) {
  if (weight == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: weight is NULL", kOp);
  const bool int8 = weight->dtype == TT_I8;
  if (dtype_size(x_dtype) == 0 || (!int8 && dtype_size(weight->dtype) == 0)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16 and values of those or int8",
                     kOp);
  }
  if (!int8 && weight->dtype != x_dtype) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected x and float values of one dtype", kOp);
  }
  if (int8 && K > TT_INT8_MAX_K) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected K <= %d, where the int32 sum is exact, got K=%lld", kOp,
                     TT_INT8_MAX_K, (long long)K);
  }
  if (weight->count < 0 || (weight->count > 0 && weight->values == nullptr) ||
      (N > 0 && (weight->row_start == nullptr || (K > 0 && weight->bits == nullptr)))) {
    return set_error(TT_INVALID_ARGUMENT, "%s: values, bits or row_start is NULL", kOp);
  }
  if (N > 0 && (weight->row_start[0] != 0 || weight->row_start[N] != weight->count)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected row_start from 0 to the %lld values, got %lld to %lld", kOp,
                     (long long)weight->count, (long long)weight->row_start[0],
                     (long long)weight->row_start[N]);
  }
  return TT_OK;
}

tt_status check(const void* x, tt_dtype x_dtype, const tt_bitmap* weight, int64_t M, int64_t N,
                int64_t K, const tt_epilogue* epilogue) {
  if (M < 0 || N < 0 || K < 0) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld N=%lld K=%lld", kOp,
                     (long long)M, (long long)N, (long long)K);
  }
  const tt_status status = check_weight(weight, x_dtype, N, K);
  if (status != TT_OK) return status;
  if (x == nullptr && M > 0 && K > 0) return set_error(TT_INVALID_ARGUMENT, "%s: x is NULL", kOp);
  return check_sparse_epilogue(kOp, epilogue, weight->dtype == TT_I8, M, N);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_bitmap_row_bytes(int64_t K) { return (K + 63) / 64 * 8; }

tt_status tt_bitmap_linear(const void* x, tt_dtype x_dtype, int64_t x_stride,
                           const tt_bitmap* weight, int64_t M, int64_t N, int64_t K,
                           const tt_epilogue* epilogue, const tt_parallel* parallel) {
  tt_status status = check(x, x_dtype, weight, M, N, K, epilogue);
  if (status != TT_OK) return status;
  tt_isa isa;
  status = current_isa(&isa);
  if (status != TT_OK || M == 0 || N == 0) return status;

  Pass pass;
  pass.isa = isa;
  const SparseLanes& lanes = sparse_lanes(isa);
  pass.kernel = bitmap_kernel(isa, *weight, M, N, K, true);
  const tt_parallel pool = pool_or_serial(parallel);
  const bool many = pool.run != nullptr && worth_threads(isa, *weight, M, N, K);
  const int threads = many ? pool.threads : 1;
  if (pass.kernel.block == nullptr)
    return bitmap_int8_expanded(kOp, isa, x, x_dtype, x_stride, *weight, M, N, K, *epilogue, pool,
                                threads);
  if (pass.kernel.dense && weight->dtype != TT_I8 && !lanes.finite(x, x_dtype, x_stride, M, K))
    pass.kernel = bitmap_kernel(isa, *weight, M, N, K, false);
  // The kernels of 64 k at once read panels of whole words of bits.
  const int64_t K_padded = pass.kernel.cell == PanelCell::kF32 ? round_up(K, 64) : K;
  const int64_t steps = std::max<int64_t>(panel_steps(K_padded, pass.kernel.cell), 1);
  const int64_t panel_bytes = pass.kernel.row != nullptr ? std::max<int64_t>(round_up(K, 64), 64) *
                                                               panel_cell_bytes(pass.kernel.cell)
                                                         : steps * kSparseStepBytes;
  const int64_t most_rows =
      std::max<int64_t>(pass.kernel.max_panel_bytes / panel_bytes * kSparseM, kSparseM);
  const bool own = pass.kernel.own_panels > 0;
  const int64_t pass_rows = own ? M : round_up(std::min(M, most_rows), kSparseM);
  const bool own_bias = epilogue->bias == nullptr || epilogue->bias_dtype != TT_F32;
  const int64_t x_bytes =
      own ? 0 : (pass.kernel.row != nullptr ? pass_rows : pass_rows / kSparseM) * panel_bytes;
  const int64_t scale_bytes = own ? 0 : pass_rows * 4;
  char* scratch =
      static_cast<char*>(thread_scratch(x_bytes + scale_bytes + (own_bias ? N * 4 : 0)));
  if (scratch == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", kOp,
                     (long long)(x_bytes + scale_bytes + N * 4));
  }
  float* bias = reinterpret_cast<float*>(scratch + x_bytes + scale_bytes);
  if (own_bias) widen_bias(*epilogue, N, bias);

  pass.dtype = x_dtype;
  pass.x_stride = x_stride;
  pass.row_bytes = x_stride * dtype_size(x_dtype);
  pass.a_scale = reinterpret_cast<float*>(scratch + x_bytes);
  pass.block = {scratch, panel_bytes,      0,       *weight, tt_bitmap_row_bytes(K), K, 0, N,
                N,       pass.kernel.cols, x_stride};
  pass.output = sparse_output(isa, *epilogue, weight->dtype == TT_I8, pass.a_scale,
                              own_bias ? bias : static_cast<const float*>(epilogue->bias));
  for (int64_t m = 0; m < M; m += pass_rows) {
    pass.x = static_cast<const char*>(x) + m * pass.row_bytes;
    pass.block.rows = std::min(pass_rows, M - m);
    pass.output.out =
        static_cast<char*>(epilogue->out) + m * epilogue->out_stride * pass.output.out_size;
    if (!(own ? run_own : run_pass)(pass, N, pool, threads))
      return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch in a thread", kOp);
  }
  return TT_OK;
}
