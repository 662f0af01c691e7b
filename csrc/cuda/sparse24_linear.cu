// sparse24_linear on a CUDA device: checks, the choice of tile, and with int8 values quantize_int8 first.
//
// Workspace, for int8 values: q [M, K] int8 in rows of round_up(K, 16) bytes, then scale [M] fp32, each part
// a multiple of 256 bytes.
#include <trimtab/sparse24_linear.h>

#include "cuda/int8_mm.cuh"
#include "cuda/quantize_int8.cuh"
#include "cuda/sparse24_mm_sm80.cuh"
#include "cuda/sparse24_mm_sm90.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "sparse24_linear";
constexpr int64_t kMost =
    INT32_MAX / 8;  // sizes and bytes of a row stay in 32 bits, up to a tile's end

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t q_stride(int64_t K) { return round_up(K, 16); }
int64_t q_bytes(int64_t M, int64_t K) { return round_up(M * q_stride(K), 256); }

int64_t size_of(tt_dtype dtype) { return dtype == TT_F32 ? 4 : dtype == TT_I8 ? 1 : 2; }

// --- the tiles

struct Config {
  int block_n, block_m, threads, shared_bytes, resident;
  void (*kernel)(const Sparse24Params);
  void (*unaligned)(
      const Sparse24Params);  // x at any address; NULL where no one needs it or it does not fit
};

template <class T, class Tile>
constexpr Config config() {
  // int8 x is our own, in aligned rows; 64 x 64 sums a warp leave no registers for loads of other rows.
  constexpr bool kSpare = sizeof(T) == 2 && Tile::WARP_N * Tile::WARP_M < 64 * 64;
  void (*unaligned)(const Sparse24Params) = nullptr;
  if constexpr (kSpare) unaligned = sparse24_mm_sm80<Tile, T, false>;
  return {Tile::BLOCK_N,      Tile::BLOCK_M,    Tile::kThreads,
          Tile::kSharedBytes, Tile::kMinBlocks, sparse24_mm_sm80<Tile, T, true>,
          unaligned};
}

// Shared memory: 144, 52 and 43 KB a block. sm_80 holds 164 KB, sm_86 and sm_89 100 KB. Registers: 64 x 64
// sums a warp are 128 a thread, so up to 255.
template <class T>
constexpr Config kConfigs[] = {
    //                        N    M   warps stages blocks
    config<T, Sparse24Tile<256, 128, 4, 2, 4, 1>>(),
    config<T, Sparse24Tile<64, 64, 2, 2, 4, 3>>(),
    config<T, Sparse24Tile<64, 16, 4, 1, 6, 3>>(),
};

// Clocks of the whole product, roughly; only their order counts. Per multiprocessor: 4096 int8 or 2048
// 16-bit multiply-adds of the whole weight a clock (A100, twice the dense rate), 32 bytes of L2.
double clocks(const Config& c, const DeviceFacts& facts, int64_t M, int64_t N, int64_t steps,
              double macs_a_clock) {
  constexpr double kL2Bytes = 32, kStepLatency = 150, kBlockLatency = 1500, kOutputs = 8;
  const double outputs = double(c.block_n) * c.block_m;
  const int64_t tiles = ceil_div(N, c.block_n) * ceil_div(M, c.block_m);
  const int64_t here = ceil_div(tiles, facts.sm_count);
  const int64_t by_shared = (facts.shared_bytes + 1024) / (c.shared_bytes + 1024);
  const int64_t resident = by_shared < c.resident ? by_shared : c.resident;
  const double rounds = double(ceil_div(here, resident));
  const double step_macs = outputs * 128, step_bytes = c.block_m * 128.0 + c.block_n * 72.0;
  const double by_macs = step_macs / macs_a_clock, by_l2 = step_bytes / kL2Bytes;
  const double busy = double(here * steps) * (by_macs > by_l2 ? by_macs : by_l2);
  const double waiting = rounds * double(steps) * kStepLatency;
  return (busy > waiting ? busy : waiting) + rounds * kBlockLatency +
         double(here) * outputs / kOutputs;
}

template <class T>
tt_status launch_product(const Sparse24Params& from, tt_stream stream) {
  Sparse24Params p = from;
  DeviceFacts facts;
  const tt_status status = device_facts(kOp, &facts);
  if (status != TT_OK) return status;
  if (sparse24_sm90_serves(p, facts)) return launch_sparse24_sm90<T>(kOp, p, facts, stream);
  const int64_t M = p.epilogue.M, N = p.epilogue.N, steps = ceil_div(p.x_bytes, 128);
  const bool aligned = rows_aligned16(p.x, p.x_stride, M);
  const Config* best = nullptr;
  double least = 0;
  for (const Config& c : kConfigs<T>) {
    if (c.shared_bytes > facts.shared_bytes || (!aligned && c.unaligned == nullptr)) continue;
    // A step is 128 bytes of x: 128 columns of int8, whose rate is twice that of the 64 of a 16-bit type.
    const double each = clocks(c, facts, M, N, steps, 4096);
    if (best != nullptr && each >= least) continue;
    best = &c;
    least = each;
  }
  if (best == nullptr)
    return set_error(TT_UNSUPPORTED, "%s: expected 43 KB of shared memory a block, got %d bytes",
                     kOp, facts.shared_bytes);
  p.tiles_m = int32_t(ceil_div(M, best->block_m));
  p.tiles_n = int32_t(ceil_div(N, best->block_n));
  const LaunchShape shape = {dim3(unsigned(int64_t(p.tiles_m) * p.tiles_n)),
                             dim3(unsigned(best->threads)), best->shared_bytes};
  return launch(kOp, aligned ? best->kernel : best->unaligned, shape, p, stream);
}

// --- checks

bool is_float(tt_dtype dtype) { return dtype == TT_F32 || dtype == TT_BF16 || dtype == TT_F16; }

tt_status check_weight(const tt_sparse24_weight& w) {
  if (w.dtype != TT_BF16 && w.dtype != TT_F16 && w.dtype != TT_I8)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected values of bfloat16, float16 or int8, got dtype %d", kOp,
                     int(w.dtype));
  if (w.N < 0 || w.K < 0 || w.N > kMost || w.K > kMost || (w.dtype == TT_I8 && w.K > TT_INT8_MAX_K))
    return set_error(TT_INVALID_ARGUMENT, "%s: expected N, K from 0 to %lld, got N=%lld K=%lld",
                     kOp, (long long)(w.dtype == TT_I8 ? TT_INT8_MAX_K : kMost), (long long)w.N,
                     (long long)w.K);
  if (w.N == 0 || w.K == 0) return TT_OK;
  if (!rows_aligned16(w.values, w.row_bytes, w.N) || w.values == nullptr ||
      w.row_bytes < round_up(w.K, 4) / 2 * size_of(w.dtype))
    return set_error(
        TT_INVALID_ARGUMENT,
        "%s: expected values in rows of at least K / 2=%lld elements, a multiple of 16 "
        "bytes apart, got %p and %lld bytes",
        kOp, (long long)(round_up(w.K, 4) / 2), w.values, (long long)w.row_bytes);
  if (w.metadata == nullptr || reinterpret_cast<uintptr_t>(w.metadata) % 16 != 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected metadata aligned to 16 bytes, got %p", kOp,
                     static_cast<const void*>(w.metadata));
  return TT_OK;
}

tt_status check(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                const tt_sparse24_weight& w, const tt_epilogue* e, const void* workspace) {
  const tt_status status = check_weight(w);
  if (status != TT_OK) return status;
  if (M < 0 || M > kMost)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected M from 0 to %lld, got %lld", kOp,
                     (long long)kMost, (long long)M);
  if (w.dtype == TT_I8 ? !is_float(x_dtype) : x_dtype != w.dtype)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected x of %s, got dtype %d", kOp,
                     w.dtype == TT_I8 ? "float32, bfloat16 or float16" : "the dtype of values",
                     int(x_dtype));
  if (e == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected an epilogue, got NULL", kOp);
  if (!is_float(e->out_dtype) || (e->bias != nullptr && !is_float(e->bias_dtype)))
    return set_error(
        TT_INVALID_ARGUMENT,
        "%s: expected out and bias of float32, bfloat16 or float16, got dtypes %d and %d", kOp,
        int(e->out_dtype), int(e->bias_dtype));
  if (e->activation < TT_ACT_NONE || e->activation > TT_ACT_SILU)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected an activation from %d to %d, got %d", kOp,
                     int(TT_ACT_NONE), int(TT_ACT_SILU), int(e->activation));
  if (M == 0 || w.N == 0) return TT_OK;
  if ((x == nullptr && w.K > 0) || e->out == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected x and out, got NULL", kOp);
  if (M > 1 && (x_stride < w.K || e->out_stride < w.N))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x_stride >= K=%lld and out_stride >= N=%lld, got %lld and %lld",
                     kOp, (long long)w.K, (long long)w.N, (long long)x_stride,
                     (long long)e->out_stride);
  if ((w.dtype == TT_I8) != (e->b_scale != nullptr))
    return set_error(TT_INVALID_ARGUMENT, "%s: expected b_scale with int8 values alone", kOp);
  const int64_t bytes = tt_sparse24_linear_cuda_workspace(M, w.K, w.dtype);
  if (bytes > 0 && (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a workspace of %lld bytes aligned to 256, got %p", kOp,
                     (long long)bytes, workspace);
  return TT_OK;
}

// q and its scales, into the workspace.
tt_status quantize(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M, int64_t K, char* q,
                   tt_stream stream) {
  QuantizeArgs args = {};
  args.x = x;
  args.x_dtype = x_dtype;
  args.x_stride = x_stride;
  args.M = M;
  args.K = K;
  args.q = reinterpret_cast<int8_t*>(q);
  args.q_stride = args.q_columns = q_stride(K);
  args.scale = reinterpret_cast<float*>(q + q_bytes(M, K));
  return launch_quantize_int8(kOp, args, stream);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_sparse24_linear_cuda_workspace(int64_t M, int64_t K, tt_dtype values_dtype) {
  if (values_dtype != TT_I8 || M <= 0 || M > kMost || K < 0 || K > TT_INT8_MAX_K) return 0;
  return q_bytes(M, K) + round_up(M * int64_t(sizeof(float)), 256);
}

tt_status tt_sparse24_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                                  const tt_sparse24_weight* weight, const tt_epilogue* epilogue,
                                  void* workspace, tt_stream stream) {
  if (weight == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a weight, got NULL", kOp);
  const tt_sparse24_weight& w = *weight;
  tt_status status = check(x, x_dtype, x_stride, M, w, epilogue, workspace);
  if (status != TT_OK || M == 0 || w.N == 0) return status;
  const bool int8 = w.dtype == TT_I8;
  char* q = static_cast<char*>(workspace);
  if (int8) {
    status = quantize(x, x_dtype, x_stride, M, w.K, q, stream);
    if (status != TT_OK) return status;
  }
  const int64_t size = size_of(w.dtype);
  Sparse24Params p = {};
  p.x = static_cast<const int8_t*>(int8 ? q : x);
  p.x_stride = int8 ? q_stride(w.K) : M > 1 ? x_stride * size : 0;
  p.values = static_cast<const int8_t*>(w.values);
  p.values_stride = w.row_bytes;
  p.metadata = w.metadata;
  p.x_bytes = int32_t(w.K * size);
  p.values_bytes = int32_t(round_up(w.K, 4) / 2 * size);
  p.blocks64 = int32_t(ceil_div(w.K, 64));
  const float* a_scale = int8 ? reinterpret_cast<const float*>(q + q_bytes(M, w.K)) : nullptr;
  p.epilogue = epilogue_params(a_scale, M, w.N, *epilogue);
  switch (w.dtype) {
    case TT_BF16: return launch_product<bf16>(p, stream);
    case TT_F16: return launch_product<fp16>(p, stream);
    default: return launch_product<int8_t>(p, stream);
  }
}
