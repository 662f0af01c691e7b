// block_linear on a CUDA device: checks, the choice of kernel, tile and parts, and with int8 values quantize_int8
// first.
//
// Workspace, each part a multiple of 256 bytes: for int8 values q [M, K] int8 in rows of round_up(K, 16) bytes
// and scale [M] fp32; for block_fma.cuh x turned; where a row of blocks is several blocks' work, their sums
// [parts][M][width].
#include <trimtab/block_linear.h>

#include "cuda/block_fma.cuh"
#include "cuda/sparse_check.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "block_linear";
constexpr int64_t kFewTokens = 32;  // up to here a tile of block_mm.cuh has 32 tokens, else 128
constexpr int64_t kWantedTiles = 512, kMostParts = 16;

// Whether the tensor cores have it (block_mm.cuh).
bool by_mma(const tt_block_weight& w) {
  return w.bn == w.bk && (w.bn == 16 || w.bn == 32 || w.bn == 64) && w.dtype != TT_F32;
}

// Outputs that a warp of block_fma.cuh sums side by side: they have to be of one row of blocks.
int fma_rows(const tt_block_weight& w) { return w.bn % 8 == 0 ? 8 : 1; }

bool sizes_valid(const tt_block_weight& w, int64_t M) {
  return M > 0 && M <= kMostSize && w.N > 0 && w.N <= kMostSize && w.K >= 0 &&
         w.K <= (w.dtype == TT_I8 ? TT_INT8_MAX_K : kMostSize) && w.blocks >= 0 &&
         w.blocks <= INT32_MAX - 64 && w.bn <= kMostSize && w.bk <= kMostSize;
}

// Of a row of blocks: so many that the tiles fill a GPU, 128 bytes of kept K at least each on average. Not asked of
// the device: the order of a sum would be the device's.
int64_t parts_of(const tt_block_weight& w, int64_t M) {
  const int64_t tile_n = by_mma(w) ? w.bn : kFmaWarps * fma_rows(w);
  const int64_t tile_m = by_mma(w) && M <= kFewTokens ? 32 : 128;
  const int64_t rows = ceil_div(w.N, w.bn), tiles = ceil_div(w.N, tile_n) * ceil_div(M, tile_m);
  const int64_t steps = w.blocks * w.bk * dtype_bytes(w.dtype) / (128 * rows);
  const int64_t wanted = kWantedTiles / tiles, most = steps < kMostParts ? steps : kMostParts;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

// Outputs of all tiles.
int64_t partial_width(const tt_block_weight& w) {
  return round_up(w.N, by_mma(w) ? w.bn : kFmaWarps * fma_rows(w));
}

int64_t turned_bytes(const tt_block_weight& w, int64_t M) {
  return by_mma(w) ? 0 : round_up(w.K * round_up(M, kFmaTokens) * dtype_bytes(w.dtype), 256);
}

int64_t partial_bytes(const tt_block_weight& w, int64_t M) {
  const int64_t parts = parts_of(w, M);
  return parts == 1 ? 0 : round_up(parts * M * partial_width(w) * 4, 256);
}

template <class T>
tt_status launch_finish(const void* partial, int parts, int64_t width, const EpilogueParams& e,
                        tt_stream stream) {
  if (parts == 1) return TT_OK;
  const BlockFinishParams finish = {partial, parts, int32_t(width), e};
  const LaunchShape shape = {dim3(unsigned(ceil_div(width, 128 * kGroup)), unsigned(e.M)),
                             dim3(128), 0};
  return launch(kOp, block_finish_kernel<BlockSum<T>>, shape, finish, stream);
}

template <class T, class Tile>
tt_status launch_tile(const BlockParams& p, tt_stream stream) {
  const int64_t rows = ceil_div(p.epilogue.N, Tile::BLOCK_N);
  const LaunchShape shape = {
      dim3(unsigned(rows), unsigned(ceil_div(p.epilogue.M, Tile::BLOCK_M)), unsigned(p.parts)),
      dim3(Tile::kThreads), Tile::kSharedBytes};
  const tt_status status = launch(kOp, block_mm_kernel<Tile, T>, shape, p, stream);
  if (status != TT_OK) return status;
  return launch_finish<T>(p.partial, p.parts, rows * Tile::BLOCK_N, p.epilogue, stream);
}

template <class T>
tt_status launch_typed(const BlockParams& p, int64_t bn, tt_stream stream) {
  if (p.epilogue.M <= kFewTokens) switch (bn) {
      case 16: return launch_tile<T, BlockTile<16, 32, 1, 2>>(p, stream);
      case 32: return launch_tile<T, BlockTile<32, 32, 2, 2>>(p, stream);
      default: return launch_tile<T, BlockTile<64, 32, 4, 1>>(p, stream);
    }
  switch (bn) {
    case 16: return launch_tile<T, BlockTile<16, 128, 1, 4>>(p, stream);
    case 32: return launch_tile<T, BlockTile<32, 128, 1, 4>>(p, stream);
    default: return launch_tile<T, BlockTile<64, 128, 2, 2>>(p, stream);
  }
}

// --- by multiply-adds

template <class T, int kRows>
tt_status launch_fma(const BlockFmaParams& p, tt_stream stream) {
  const int64_t blocks = ceil_div(p.epilogue.N, kFmaOutputs<kRows>);
  const LaunchShape shape = {
      dim3(unsigned(blocks), unsigned(p.tokens / kFmaTokens), unsigned(p.parts)),
      dim3(32 * kFmaWarps), kFmaTokens * kFmaPitch<kRows> * 4};
  const tt_status status = launch(kOp, block_fma_kernel<T, kRows>, shape, p, stream);
  if (status != TT_OK) return status;
  return launch_finish<T>(p.partial, p.parts, blocks * kFmaOutputs<kRows>, p.epilogue, stream);
}

// x [M, K] of T, rows x_stride elements apart, turned into `xt` first.
template <class T>
tt_status launch_turned(BlockFmaParams p, const void* x, int64_t x_stride, void* xt,
                        tt_stream stream) {
  p.xt = static_cast<const char*>(xt);
  if (p.K > 0) {
    const BlockTurnParams turn = {x, x_stride, xt, p.epilogue.M, p.K, p.tokens};
    const LaunchShape shape = {dim3(unsigned(ceil_div(p.K, 32) * (p.tokens / 32))), dim3(256),
                               32 * 33 * int(sizeof(T))};
    const tt_status status = launch(kOp, block_turn_kernel<BitsOf<T>>, shape, turn, stream);
    if (status != TT_OK) return status;
  }
  return p.bn % 8 == 0 ? launch_fma<T, 8>(p, stream) : launch_fma<T, 1>(p, stream);
}

tt_status launch_by_fma(const tt_block_weight& w, const void* x, int64_t x_stride,
                        const EpilogueParams& epilogue, char* turned, void* partial,
                        tt_stream stream) {
  const int64_t M = epilogue.M;
  BlockFmaParams p = {};
  p.values = static_cast<const char*>(w.values);
  p.crow = w.crow;
  p.col = w.col;
  p.blocks = int32_t(w.blocks);
  p.bn = int32_t(w.bn);
  p.bk = int32_t(w.bk);
  p.K = int32_t(w.K);
  p.tokens = int32_t(round_up(M, kFmaTokens));
  p.wide = reinterpret_cast<uintptr_t>(w.values) % 16 == 0 && w.bk * dtype_bytes(w.dtype) % 16 == 0;
  p.parts = int32_t(parts_of(w, M));
  p.partial = partial;
  p.epilogue = epilogue;
  switch (w.dtype) {
    case TT_F32: return launch_turned<float>(p, x, x_stride, turned, stream);
    case TT_BF16: return launch_turned<bf16>(p, x, x_stride, turned, stream);
    case TT_F16: return launch_turned<fp16>(p, x, x_stride, turned, stream);
    default: return launch_turned<int8_t>(p, x, x_stride, turned, stream);
  }
}

tt_status check(const void* x, tt_dtype x_dtype, int64_t x_stride, const tt_block_weight& w,
                int64_t M, const tt_epilogue* epilogue, const void* workspace) {
  const tt_status status =
      check_sparse_cuda(kOp, x, x_dtype, x_stride, w.dtype, M, w.N, w.K, epilogue);
  if (status != TT_OK || M == 0 || w.N == 0) return status;
  if (w.bn < 1 || w.bk < 1)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected blocks of at least 1 x 1, got %lld x %lld",
                     kOp, (long long)w.bn, (long long)w.bk);
  if (!sizes_valid(w, M) || ceil_div(M, 128) > 65535)
    return set_error(TT_UNSUPPORTED,
                     "%s: expected at most 8388480 rows and 2^31 - 65 blocks, got "
                     "M=%lld and %lld",
                     kOp, (long long)M, (long long)w.blocks);
  if (w.crow == nullptr || (w.blocks > 0 && (w.col == nullptr || w.values == nullptr)))
    return set_error(TT_INVALID_ARGUMENT, "%s: values, crow or col is NULL", kOp);
  const bool x_aligned =
      w.dtype == TT_I8 || w.K == 0 || aligned_rows(x, x_stride * dtype_bytes(x_dtype), M, 16);
  if (by_mma(w) && (reinterpret_cast<uintptr_t>(w.values) % 16 != 0 || !x_aligned))
    return set_error(
        TT_UNSUPPORTED,
        "%s: expected values and float rows of x aligned to 16 bytes, got %p, %p and a "
        "stride of %lld elements",
        kOp, w.values, x, (long long)x_stride);
  return check_workspace(kOp, workspace, tt_block_linear_cuda_workspace(&w, M));
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_block_linear_cuda_workspace(const tt_block_weight* weight, int64_t M) {
  if (weight == nullptr || weight->bn < 1 || weight->bk < 1 || !sizes_valid(*weight, M)) return 0;
  return quantized_bytes(M, weight->K, weight->dtype) + turned_bytes(*weight, M) +
         partial_bytes(*weight, M);
}

tt_status tt_block_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                               const tt_block_weight* weight, int64_t M,
                               const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  if (weight == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a weight, got NULL", kOp);
  const tt_block_weight& w = *weight;
  tt_status status = check(x, x_dtype, x_stride, w, M, epilogue, workspace);
  if (status != TT_OK || M == 0 || w.N == 0) return status;
  const int64_t size = dtype_bytes(w.dtype);
  char* turned = static_cast<char*>(workspace) + quantized_bytes(M, w.K, w.dtype);
  char* partial = turned + turned_bytes(w, M);
  const float* a_scale = nullptr;
  if (w.dtype == TT_I8) {
    const QuantizedX q = quantized_x(workspace, M, w.K);
    status = launch_quantize_x(kOp, x, x_dtype, x_stride, M, w.K, q, stream);
    if (status != TT_OK) return status;
    x = q.codes;
    x_stride = q.stride;
    a_scale = q.scale;
  }
  const EpilogueParams finish = epilogue_params(a_scale, M, w.N, *epilogue);
  if (!by_mma(w)) return launch_by_fma(w, x, x_stride, finish, turned, partial, stream);
  BlockParams p = {};
  p.x = static_cast<const char*>(x);
  p.x_stride = M > 1 ? x_stride * size : 0;
  p.values = static_cast<const char*>(w.values);
  p.crow = w.crow;
  p.col = w.col;
  p.blocks = int32_t(w.blocks);
  p.row_bytes = int32_t(w.bk * size);
  p.x_bytes = int32_t(w.K * size);
  p.parts = int32_t(parts_of(w, M));
  p.partial = partial;
  p.epilogue = finish;
  switch (w.dtype) {
    case TT_BF16: return launch_typed<bf16>(p, w.bn, stream);
    case TT_F16: return launch_typed<fp16>(p, w.bn, stream);
    default: return launch_typed<int8_t>(p, w.bn, stream);
  }
}
