// int8 weights where AMX and vpexpandb are not both there: 64 rows of the weight are expanded into the packed
// layout of the dense product (tt_int8_pack), in scratch, and meet its kernel. For many rows of x that costs
// what the dense product does; for few, reading fewer bytes pays for the expansion about.
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

constexpr int64_t kMaxPanelBytes = int64_t(4) << 20;

struct Product {
  const Int8Kernel* kernel;
  const SparseLanes* lanes;
  BitmapExpandFn expand;
  tt_bitmap weight;
  int64_t row_bytes, N, K;  // K rounded up to 64
  Int8Block block;  // all columns of a pass; b is a task's own
};

// Rows [n, n + cols) -> b [cols / 16][K / 4][16][4]
void expand_strip(const Product& s, int64_t n, int cols, int8_t* b) {
  alignas(64) int8_t rows[kPanelN * kStepK];
  for (int panel = 0; panel < cols; panel += kPanelN) {
    const int8_t* next[kPanelN];
    const int valid = std::min<int>(cols - panel, kPanelN);
    for (int r = 0; r < valid; ++r)
      next[r] = static_cast<const int8_t*>(s.weight.values) + s.weight.row_start[n + panel + r];
    std::memset(rows, 0, sizeof rows);
    for (int64_t byte = 0; byte < s.row_bytes; byte += 8, b += kPanelN * kStepK) {
      for (int r = 0; r < valid; ++r) {
        uint64_t word;
        std::memcpy(&word, s.weight.bits + (n + panel + r) * s.row_bytes + byte, 8);
        next[r] = s.expand(word, next[r], rows + r * kStepK);
      }
      s.lanes->transpose(rows, kStepK / 4, b, kStepK / 4);
    }
  }
}

bool strip(const Product& s, int64_t n) {
  int8_t* b = static_cast<int8_t*>(thread_scratch(kMaxTileN * s.K, Scratch::kRow));
  if (b == nullptr) return false;
  const int cols = int(std::min<int64_t>(s.N - n, kMaxTileN));
  expand_strip(s, n, cols, b);
  Int8Block block = s.block;
  block.b = b;
  block.N = block.n_end = cols;
  block.b_scale += n;
  block.bias += n;
  block.out += n * block.out_size;
  s.kernel->block(block);
  return true;
}

bool run_pass(const Product& s, const tt_parallel& pool, int threads) {
  Shares shares((s.N + kMaxTileN - 1) / kMaxTileN, threads);
  std::atomic<bool> done{true};
  parallel_run(pool, shares.count, [&](int64_t thread) {
    for (int64_t task; (task = shares.take(thread)) >= 0;)
      if (!strip(s, task * kMaxTileN)) done.store(false, std::memory_order_relaxed);
  });
  return done.load();
}

BitmapExpandFn bitmap_expand(tt_isa isa) {
  if (isa >= TT_ISA_AVX512 && has_avx512_vbmi2()) return bitmap_expand_vbmi2_avx512;
  return isa == TT_ISA_SCALAR ? bitmap_expand_scalar : bitmap_expand_avx2;
}

}  // namespace

tt_status bitmap_int8_expanded(const char* op, tt_isa isa, const void* x, tt_dtype x_dtype,
                               int64_t x_stride, const tt_bitmap& weight, int64_t M, int64_t N,
                               int64_t K, const tt_epilogue& epilogue, const tt_parallel& pool,
                               int threads) {
  Product s;
  s.kernel = &int8_kernel(isa, M, N * K);
  s.lanes = &sparse_lanes(isa);
  s.expand = bitmap_expand(isa);
  s.weight = weight;
  s.row_bytes = tt_bitmap_row_bytes(K);
  s.N = N;
  s.K = std::max<int64_t>(round_up(K, kStepK), kStepK);
  const int64_t panel_bytes = s.K * s.kernel->mr * s.kernel->a_cell, tall = s.kernel->tile_panels;
  const int64_t fit = std::min(kMaxPanelBytes / panel_bytes, int64_t(kMaxBlockM) / s.kernel->mr);
  const int64_t pass_panels = std::max(fit / tall * tall, tall);
  const int64_t pass_rows = std::min(pass_panels * s.kernel->mr, round_up(M, s.kernel->mr));
  const bool own_bias = epilogue.bias == nullptr || epilogue.bias_dtype != TT_F32;
  const int64_t a_bytes = round_up(pass_rows / s.kernel->mr * panel_bytes, 64);
  const int64_t scale_bytes = round_up(pass_rows * 4, 64);
  char* scratch =
      static_cast<char*>(thread_scratch(a_bytes + scale_bytes + (own_bias ? N * 4 : 0)));
  if (scratch == nullptr) return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch", op);
  float* bias = reinterpret_cast<float*>(scratch + a_bytes + scale_bytes);
  if (own_bias) widen_bias(epilogue, N, bias);
  float* a_scale = reinterpret_cast<float*>(scratch + a_bytes);
  for (int64_t m = 0; m < M; m += pass_rows) {
    const int64_t rows = std::min(pass_rows, M - m);
    const int64_t panels = (rows + s.kernel->mr - 1) / s.kernel->mr;
    const int mr = int((rows + panels - 1) / panels);  // even panels: 17 rows as 9 + 8
    const int size = dtype_size(x_dtype);
    const char* from = static_cast<const char*>(x) + m * x_stride * size;
    const tt_parallel fill = rows * K > 24 * 1024 && threads > 1 ? pool : pool_or_serial(nullptr);
    parallel_run(fill, panels, [&](int64_t p) {
      s.kernel->quantize_a(from + p * mr * x_stride * size, x_dtype, x_stride,
                           int(std::min<int64_t>(mr, rows - p * mr)), K, scratch + p * panel_bytes,
                           a_scale + p * mr);
    });
    char* out =
        static_cast<char*>(epilogue.out) + m * epilogue.out_stride * dtype_size(epilogue.out_dtype);
    s.block = {scratch,
               panel_bytes,
               a_scale,
               rows,
               mr,
               nullptr,
               s.K,
               0,
               0,
               0,
               epilogue.b_scale,
               own_bias ? bias : static_cast<const float*>(epilogue.bias),
               0.0f,
               out,
               epilogue.out_stride,
               dtype_size(epilogue.out_dtype),
               s.kernel->epilogue(epilogue.activation, epilogue.out_dtype)};
    if (!run_pass(s, pool, threads))
      return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch in a thread", op);
  }
  return TT_OK;
}

}  // namespace trimtab
