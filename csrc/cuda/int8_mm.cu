// int8_mm on a CUDA device: checks, workspace, the choice of kernel and its launch.
#include "cuda/int8_mm.cuh"

#include "cuda/int8_mm_sm80.cuh"
#include "cuda/int8_mm_sm90.cuh"
#include "cuda/int8_mm_small.cuh"

namespace trimtab {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- workspace

constexpr int64_t kCounterBytes = kSplitCounters * int64_t(sizeof(uint32_t));
constexpr int64_t kMostSplits = 16;
constexpr int64_t kSplitLeastK = 1024;  // shorter sums are done before the parts have met
// The largest tile, to which parts round up.
constexpr int64_t kMostTileM = 128, kMostTileN = 256;

// --- the small kernel

using SmallKernel = void (*)(const Int8MmSmallParams);

// [rows - 1][tokens - 1][aligned]
constexpr SmallKernel kSmallKernels[2][2][2] = {
    {{int8_mm_small<1, 1, false>, int8_mm_small<1, 1, true>},
     {int8_mm_small<1, 2, false>, int8_mm_small<1, 2, true>}},
    {{int8_mm_small<2, 1, false>, int8_mm_small<2, 1, true>},
     {int8_mm_small<2, 2, false>, int8_mm_small<2, 2, true>}},
};

// --- the sm_80 kernel

struct Sm80Config {
  int block_m, block_n, block_k, threads, shared_bytes;
  int resident[2];  // blocks a multiprocessor holds: of the unaligned kernel, of the other
  void (*kernel)(const Int8MmSm80Params);
  void (*unaligned)(const Int8MmSm80Params);  // NULL for tiles whose sums leave it no registers
};

template <class Tile>
constexpr Sm80Config sm80_config() {
  constexpr bool kSpare = Tile::WARP_M * Tile::WARP_N < 64 * 64;
  void (*unaligned)(const Int8MmSm80Params) = nullptr;
  if constexpr (kSpare) unaligned = int8_mm_sm80<Tile, false>;
  return {Tile::BLOCK_M,
          Tile::BLOCK_N,
          Tile::BLOCK_K,
          Tile::kThreads,
          Tile::kSharedBytes,
          {Tile::kUnalignedBlocks, Tile::kMinBlocks},
          int8_mm_sm80<Tile, true>,
          unaligned};
}

// Shared memory: 96, 64, 48, 40 and 48 KB a block; sm_80 holds 164 KB, sm_86 and sm_89 100 KB.
// Registers: 64 x 64 sums a warp are 128 a thread, so up to 255.
constexpr Sm80Config kSm80Configs[] = {
    //                 M    N    K  warps stages blocks
    sm80_config<Sm80Tile<128, 256, 64, 2, 4, 4, 1>>(),
    sm80_config<Sm80Tile<128, 128, 64, 2, 2, 4, 2>>(),
    sm80_config<Sm80Tile<64, 128, 64, 2, 2, 4, 3>>(),
    sm80_config<Sm80Tile<64, 64, 64, 2, 2, 5, 4>>(),
    sm80_config<Sm80Tile<32, 64, 128, 2, 2, 4, 3>>(),
};
constexpr int kSm80Tiles = sizeof kSm80Configs / sizeof kSm80Configs[0];

// Clocks of the whole product, roughly; only their order counts. 32-bit divisions: this runs for every
// call.
double sm80_clocks(const Sm80Config& config, const DeviceFacts& facts, bool aligned, uint32_t tiles,
                   uint32_t steps, uint32_t splits, double operand_bytes) {
  // A multiprocessor and clock, from the A100's data sheet and what its L2 delivers; of memory, what the
  // H100's delivers, since too many splits cost less than too few.
  constexpr double kMacs = 2048, kL2Bytes = 32, kMemoryBytes = 16;
  constexpr double kStepLatency = 60;  // ldmatrix and mma of 32 bytes of K, nothing beside them
  constexpr double kBlockLatency = 1500;  // launch, and the first tiles' way from memory
  constexpr double kOutputs = 8;  // a clock, epilogue and store
  const double m = config.block_m, n = config.block_n, k = config.block_k;
  const uint32_t sm_count = uint32_t(facts.sm_count);
  const uint32_t here = (tiles * splits + sm_count - 1) / sm_count;  // blocks on the fullest one
  // A block takes 1 KB more than it asks for; a multiprocessor has 1 KB more than a block may ask for.
  const uint32_t by_shared =
      uint32_t(facts.shared_bytes + 1024) / uint32_t(config.shared_bytes + 1024);
  const uint32_t by_registers = uint32_t(config.resident[aligned]);
  const uint32_t resident = by_shared < by_registers ? by_shared : by_registers;
  const double rounds = (here + resident - 1) / resident;
  const double slice = (steps + splits - 1) / splits;
  const double by_macs = m * n * k / kMacs, by_l2 = (m + n) * k / kL2Bytes;
  const double busy = here * slice * (by_macs > by_l2 ? by_macs : by_l2);
  const double waiting = rounds * slice * (k / 32 * kStepLatency);
  const double memory = operand_bytes / (kMemoryBytes * sm_count);
  double clocks = busy > waiting ? busy : waiting;
  clocks = clocks > memory ? clocks : memory;
  clocks += rounds * kBlockLatency + double(here) / splits * (m * n / kOutputs);
  if (splits > 1) clocks += kBlockLatency + (splits + 1) * m * n * 4 / kL2Bytes;
  return clocks;
}

bool operands_aligned(const Int8MmArgs& args) {
  return rows_aligned16(args.a, args.a_stride, args.M) &&
         rows_aligned16(args.b, args.b_stride, args.N);
}

int64_t sm80_tiles(const Sm80Config& config, const Int8MmArgs& args) {
  return ceil_div(args.M, config.block_m) * ceil_div(args.N, config.block_n);
}

// As K, the counters and the parts allow.
int64_t most_splits(const Sm80Config& config, const Int8MmArgs& args, int64_t tiles,
                    int64_t parts_bytes) {
  constexpr int64_t kLeastSteps = 4;  // of a split: as many as fill the stages
  if (args.counters == nullptr || tiles > kSplitCounters) return 1;
  const int64_t tile_bytes = int64_t(config.block_m) * config.block_n * int64_t(sizeof(int32_t));
  const int64_t by_k = args.K / (kLeastSteps * config.block_k);
  const int64_t by_parts = parts_bytes / (tiles * tile_bytes);
  const int64_t most = by_k < by_parts ? by_k : by_parts;
  return most < 1 ? 1 : most < kMostSplits ? most : kMostSplits;
}

}  // namespace

int64_t int8_mm_parts_bytes(int64_t M, int64_t N, int64_t K) {
  if (M <= kSmallMostM || N <= 0 || K < kSplitLeastK) return 0;
  if (M > kSplitPartsMost || N > kSplitPartsMost) return 0;  // the products below stay in range
  const int64_t part = round_up(M, kMostTileM) * round_up(N, kMostTileN) * int64_t(sizeof(int32_t));
  const int64_t wanted = kMostSplits * part;
  if (2 * part > kSplitPartsMost) return 0;
  return wanted < kSplitPartsMost ? wanted : kSplitPartsMost;
}

int64_t int8_mm_workspace_bytes(int64_t M, int64_t N, int64_t K) {
  const int64_t parts = int8_mm_parts_bytes(M, N, K);
  return parts == 0 ? 0 : kCounterBytes + parts;
}

void int8_mm_take_workspace(void* workspace, Int8MmArgs* args) {
  const bool used = int8_mm_parts_bytes(args->M, args->N, args->K) > 0;
  args->counters = used ? static_cast<uint32_t*>(workspace) : nullptr;
  args->parts =
      used ? reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + kCounterBytes) : nullptr;
}

tt_status zero_counters(const char* op, const Int8MmArgs& args, tt_stream stream) {
  if (args.counters_are_zero) return TT_OK;
  const cudaError_t error =
      cudaMemsetAsync(args.counters, 0, kCounterBytes, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return TT_OK;
  return set_error(TT_CUDA_ERROR, "%s: zeroing its counters failed: %s", op,
                   cudaGetErrorString(error));
}

SmallPlan plan_int8_mm_small(const Int8MmArgs& args, const DeviceFacts& facts) {
  // 32 rows a block halve what the tokens cost in L2 (at M = 16, 16 rows ask it for as many bytes of
  // tokens as of weight), where the blocks still reach all multiprocessors.
  const int64_t sms = facts.sm_count;
  SmallPlan plan;
  plan.rows = 10 * ceil_div(args.N, 32) >= 9 * sms ? 2 : 1;
  // Eight warps a multiprocessor have 32 KB on the way. More than K has turns for would idle.
  const int64_t wanted = 8 * sms;
  const int64_t blocks = ceil_div(args.N, 16 * plan.rows);
  const int64_t turns = ceil_div(args.K, 4 / plan.rows * kSmallStep);
  plan.warps = 4;
  while (plan.warps < kSmallMostWarps && plan.warps < turns && blocks * plan.warps < wanted)
    plan.warps *= 2;
  return plan;
}

tt_status launch_int8_mm_small(const char* op, const Int8MmArgs& args, SmallPlan plan,
                               tt_stream stream) {
  Int8MmSmallParams params;
  params.a = args.a;
  params.a_stride = args.M > 1 ? args.a_stride : 0;  // any, so that no address is odd
  params.b = args.b;
  params.b_stride = args.N > 1 ? args.b_stride : 0;
  params.K = int32_t(args.K);
  params.epilogue = epilogue_params(args.a_scale, args.M, args.N, args.epilogue);
  const int tokens = args.M > 8 ? 2 : 1;
  const bool aligned = operands_aligned(args);
  LaunchShape shape;
  shape.grid = dim3(unsigned(ceil_div(args.N, 16 * plan.rows)));
  shape.block = dim3(unsigned(32 * plan.warps));
  shape.shared_bytes = small_shared_bytes(plan.rows, tokens, plan.warps);
  return launch(op, kSmallKernels[plan.rows - 1][tokens - 1][aligned], shape, params, stream);
}

int sm80_tile_count() { return kSm80Tiles; }

bool sm80_plan_fits(const Int8MmArgs& args, Sm80Plan plan) {
  const Sm80Config& config = kSm80Configs[plan.tile];
  if (config.unaligned == nullptr && !operands_aligned(args)) return false;
  const int64_t parts = int8_mm_parts_bytes(args.M, args.N, args.K);
  return plan.splits <= most_splits(config, args, sm80_tiles(config, args), parts);
}

Sm80Plan plan_int8_mm_sm80(const Int8MmArgs& args, const DeviceFacts& facts) {
  constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
  const double operand_bytes = double(args.M + args.N) * double(args.K);
  const int64_t parts = int8_mm_parts_bytes(args.M, args.N, args.K);
  const uint32_t sms = uint32_t(facts.sm_count);
  const bool aligned = operands_aligned(args);
  Sm80Plan best = {kSm80Tiles - 1, 1};
  double least = -1;
  for (int tile = 0; tile < kSm80Tiles; ++tile) {
    const Sm80Config& config = kSm80Configs[tile];
    if (config.shared_bytes > facts.shared_bytes || (!aligned && config.unaligned == nullptr))
      continue;
    const int64_t tiles = sm80_tiles(config, args);
    const uint32_t counted = uint32_t(tiles < INT32_MAX / 16 ? tiles : INT32_MAX / 16);
    const uint32_t steps = uint32_t(ceil_div(args.K, config.block_k));
    const int64_t most = tiles > 2 * facts.sm_count ? 1 : most_splits(config, args, tiles, parts);
    for (const int splits : kSplits) {
      // Over four blocks a multiprocessor there is nothing left to gain.
      if (splits > most || (splits > 1 && counted * uint32_t(splits) > 4 * sms)) break;
      const double clocks =
          sm80_clocks(config, facts, aligned, counted, steps, uint32_t(splits), operand_bytes);
      if (least >= 0 && clocks >= least) continue;
      least = clocks;
      best = {tile, splits};
    }
  }
  return best;
}

tt_status launch_int8_mm_sm80(const char* op, const Int8MmArgs& args, Sm80Plan plan,
                              tt_stream stream) {
  const Sm80Config& config = kSm80Configs[plan.tile];
  const int64_t steps = ceil_div(args.K, config.block_k);
  Int8MmSm80Params params;
  params.a = args.a;
  params.a_stride = args.M > 1 ? args.a_stride : 0;  // any, so that no address is odd
  params.b = args.b;
  params.b_stride = args.N > 1 ? args.b_stride : 0;
  params.K = int32_t(args.K);
  params.tiles_m = int32_t(ceil_div(args.M, config.block_m));
  params.tiles_n = int32_t(ceil_div(args.N, config.block_n));
  params.steps_a_split = int32_t(ceil_div(steps, plan.splits));
  // No empty slice: 17 steps by 6 are 3 each, which 6 slices take; by 12 are 2 each, and 9 do.
  params.splits = steps == 0 ? 1 : int32_t(ceil_div(steps, params.steps_a_split));
  params.counters = args.counters;
  params.parts = args.parts;
  params.epilogue = epilogue_params(args.a_scale, args.M, args.N, args.epilogue);
  if (params.splits > 1) {
    const tt_status status = zero_counters(op, args, stream);
    if (status != TT_OK) return status;
  }
  const bool aligned = operands_aligned(args);
  LaunchShape shape;
  shape.grid = dim3(unsigned(int64_t(params.tiles_m) * params.tiles_n), unsigned(params.splits));
  shape.block = dim3(unsigned(config.threads));
  shape.shared_bytes = config.shared_bytes;
  return launch(op, aligned ? config.kernel : config.unaligned, shape, params, stream);
}

namespace {

bool is_float(tt_dtype dtype) { return dtype == TT_F32 || dtype == TT_BF16 || dtype == TT_F16; }

tt_status check_epilogue(const char* op, int64_t M, int64_t N, const tt_epilogue& epilogue) {
  if (epilogue.b_scale == nullptr || epilogue.out == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected b_scale and out, got NULL", op);
  const tt_dtype bias_dtype = epilogue.bias == nullptr ? TT_F32 : epilogue.bias_dtype;
  const bool int8 = epilogue.out_dtype == TT_I8;
  if ((!int8 && !is_float(epilogue.out_dtype)) || !is_float(bias_dtype))
    return set_error(
        TT_INVALID_ARGUMENT,
        "%s: expected dtypes float32, bfloat16 or float16, or int8 for out, got %d for "
        "out and %d for bias",
        op, int(epilogue.out_dtype), int(bias_dtype));
  if (int8 != (epilogue.out_scale != nullptr))
    return set_error(
        TT_INVALID_ARGUMENT, "%s: expected %s", op,
        int8 ? "out_scale for int8 out, got NULL" : "out_scale NULL where out is not int8");
  if (epilogue.activation < TT_ACT_NONE || epilogue.activation > TT_ACT_SILU)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected an activation from %d to %d, got %d", op,
                     int(TT_ACT_NONE), int(TT_ACT_SILU), int(epilogue.activation));
  if (M > 1 && epilogue.out_stride < N)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected out_stride >= N=%lld, got %lld", op,
                     (long long)N, (long long)epilogue.out_stride);
  return TT_OK;
}

}  // namespace

tt_status check_int8_mm_cuda(const char* op, int64_t M, int64_t N, int64_t K, const int8_t* b,
                             int64_t b_stride, const tt_epilogue* epilogue, const void* workspace,
                             int64_t workspace_bytes) {
  constexpr int64_t kMost = INT32_MAX - kMostTileN;  // 32 bits count rows, up to a tile's end
  if (M < 0 || N < 0 || K < 0 || M > kMost || N > kMost)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected sizes from 0 to %lld, got M=%lld N=%lld K=%lld", op,
                     (long long)kMost, (long long)M, (long long)N, (long long)K);
  if (K > TT_INT8_MAX_K)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected K <= %d, where the int32 sum is exact, got K=%lld", op,
                     TT_INT8_MAX_K, (long long)K);
  if (epilogue == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected an epilogue, got NULL", op);
  if (M == 0 || N == 0) return TT_OK;
  if (b == nullptr && K > 0) return set_error(TT_INVALID_ARGUMENT, "%s: expected b, got NULL", op);
  if (N > 1 && b_stride < K)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected b_stride >= K=%lld, got %lld", op,
                     (long long)K, (long long)b_stride);
  if (workspace_bytes > 0 &&
      (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a workspace of %lld bytes aligned to 256, got %p", op,
                     (long long)workspace_bytes, workspace);
  return check_epilogue(op, M, N, *epilogue);
}

tt_status launch_int8_mm(const char* op, const Int8MmArgs& args, tt_stream stream) {
  if (args.M == 0 || args.N == 0) return TT_OK;
  DeviceFacts facts;
  const tt_status status = device_facts(op, &facts);
  if (status != TT_OK) return status;
  if (args.M <= kSmallMostM)
    return launch_int8_mm_small(op, args, plan_int8_mm_small(args, facts), stream);
  if (int8_mm_sm90_serves(args, facts)) return launch_int8_mm_sm90(op, args, stream);
  return launch_int8_mm_sm80(op, args, plan_int8_mm_sm80(args, facts), stream);
}

}  // namespace trimtab

using namespace trimtab;

int64_t tt_int8_mm_cuda_workspace(int64_t M, int64_t N, int64_t K) {
  return int8_mm_workspace_bytes(M, N, K);
}

tt_status tt_int8_mm_cuda(const int8_t* a, int64_t a_stride, const float* a_scale, const int8_t* b,
                          int64_t b_stride, int64_t M, int64_t N, int64_t K,
                          const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  const char* op = "int8_mm";
  const tt_status status = check_int8_mm_cuda(op, M, N, K, b, b_stride, epilogue, workspace,
                                              int8_mm_workspace_bytes(M, N, K));
  if (status != TT_OK || M == 0 || N == 0) return status;
  if ((a == nullptr && K > 0) || a_scale == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a and a_scale, got NULL", op);
  if (M > 1 && a_stride < K)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a_stride >= K=%lld, got %lld", op,
                     (long long)K, (long long)a_stride);
  Int8MmArgs args = {};
  args.a = a;
  args.a_stride = a_stride;
  args.a_scale = a_scale;
  args.b = b;
  args.b_stride = b_stride;
  args.M = M;
  args.N = N;
  args.K = K;
  args.epilogue = *epilogue;
  int8_mm_take_workspace(workspace, &args);
  return launch_int8_mm(op, args, stream);
}
