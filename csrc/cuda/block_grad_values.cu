// block_linear's gradient of the kept values on a CUDA device: checks, the choice of kernel and parts.
//
// Workspace: where the tokens are several blocks' work, their sums [parts][blocks, bn, bk] fp32.
#include <trimtab/block_linear.h>

#include "cuda/block_grad.cuh"
#include "cuda/float_chunk.cuh"
#include "cuda/sparse_check.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "block_grad_values";
constexpr int64_t kWantedTiles = 512, kMostParts = 16;

bool gathered(const tt_block_weight& w) {
  return w.bn == w.bk && (w.bn == 16 || w.bn == 32 || w.bn == 64);
}

int64_t rows_of(const tt_block_weight& w) { return ceil_div(w.N, w.bn); }
int64_t tiles_k_of(const tt_block_weight& w) { return ceil_div(round_up(w.K, w.bk), 128); }

// Thread blocks of a part: slots of find_group, or tiles of 64 x 128.
int64_t tiles_of(const tt_block_weight& w) {
  if (gathered(w)) return w.blocks * w.bk / 128 + rows_of(w);
  return ceil_div(rows_of(w) * w.bn, 64) * tiles_k_of(w);
}

int64_t steps_of(const tt_block_weight& w, int64_t M) {
  return ceil_div(M, 128 / dtype_bytes(w.dtype));
}

// So many that the tiles fill a GPU, two steps at least each. Not asked of the device: the order of a sum would be
// the device's.
int64_t parts_of(const tt_block_weight& w, int64_t M) {
  const int64_t steps = steps_of(w, M) / 2, wanted = kWantedTiles / tiles_of(w);
  const int64_t most = steps < kMostParts ? steps : kMostParts;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

bool sizes_valid(const tt_block_weight& w, int64_t M) {
  return M >= 0 && M <= kMostSize && w.N >= 0 && w.N <= kMostSize && w.K >= 0 && w.K <= kMostSize &&
         w.blocks >= 0 && w.blocks <= INT32_MAX - 64 && w.bn >= 1 && w.bk >= 1 &&
         w.bn <= kMostSize && w.bk <= kMostSize && is_float(w.dtype);
}

bool empty(const tt_block_weight& w) { return w.blocks == 0 || w.N == 0 || w.K == 0; }

tt_status check(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride,
                const tt_block_weight& w, int64_t M, const void* values, const void* workspace) {
  if (!sizes_valid(w, M))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a float dtype, blocks of at least 1 x 1 and M, N, K from 0 to "
                     "%lld, got dtype "
                     "%d, %lld blocks of %lld x %lld, M=%lld N=%lld K=%lld",
                     kOp, (long long)kMostSize, int(w.dtype), (long long)w.blocks, (long long)w.bn,
                     (long long)w.bk, (long long)M, (long long)w.N, (long long)w.K);
  if (empty(w)) return TT_OK;
  if ((M > 0 && (grad == nullptr || x == nullptr)) || w.crow == nullptr || w.col == nullptr ||
      values == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: grad, x, crow, col or grad_values is NULL", kOp);
  const int64_t size = dtype_bytes(w.dtype);
  if (!aligned_rows(grad, grad_stride * size, M, 16) || !aligned_rows(x, x_stride * size, M, 16))
    return set_error(TT_UNSUPPORTED,
                     "%s: expected rows of grad and x aligned to 16 bytes, got %p and %p with "
                     "strides of %lld and %lld elements",
                     kOp, grad, x, (long long)grad_stride, (long long)x_stride);
  if (tiles_of(w) > INT32_MAX)
    return set_error(TT_UNSUPPORTED, "%s: expected at most 2^31 - 1 tiles, got N=%lld K=%lld", kOp,
                     (long long)w.N, (long long)w.K);
  return check_workspace(kOp, workspace, tt_block_grad_values_cuda_workspace(&w, M));
}

template <class T>
tt_status launch_finish(const BlockGradParams& p, tt_stream stream) {
  const int64_t groups = ceil_div(int64_t(p.blocks) * p.bn * p.bk, 256);
  const LaunchShape shape = {dim3(unsigned(groups < 65535 ? groups : 65535)), dim3(256), 0};
  return launch(kOp, block_grad_finish_kernel<T>, shape, p, stream);
}

template <class T, int kN>
LaunchShape shape_of(int64_t tiles, int64_t parts) {
  using Tile = BlockGradTile<T, kN>;
  return {dim3(unsigned(tiles), unsigned(parts)), dim3(Tile::kThreads), Tile::kSharedBytes};
}

template <class T, int kN>
tt_status launch_gathered(const BlockGradParams& p, int64_t tiles, tt_stream stream) {
  return launch(kOp, block_grad_gathered_kernel<BlockGradTile<T, kN>>,
                shape_of<T, kN>(tiles, p.parts), p, stream);
}

template <class T>
tt_status launch_typed(const tt_block_weight& w, const BlockGradParams& p, tt_stream stream) {
  const int64_t tiles = tiles_of(w);
  tt_status status = TT_OK;
  if (!gathered(w))
    status = launch(kOp, block_grad_sampled_kernel<BlockGradTile<T, 64>>,
                    shape_of<T, 64>(tiles, p.parts), p, stream);
  else if (w.bn == 16) status = launch_gathered<T, 16>(p, tiles, stream);
  else if (w.bn == 32) status = launch_gathered<T, 32>(p, tiles, stream);
  else status = launch_gathered<T, 64>(p, tiles, stream);
  return status != TT_OK || p.parts == 1 ? status : launch_finish<T>(p, stream);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_block_grad_values_cuda_workspace(const tt_block_weight* weight, int64_t M) {
  if (weight == nullptr || !sizes_valid(*weight, M) || empty(*weight)) return 0;
  const int64_t parts = parts_of(*weight, M);
  return parts == 1 ? 0 : round_up(parts * weight->blocks * weight->bn * weight->bk * 4, 256);
}

tt_status tt_block_grad_values_cuda(const void* grad, int64_t grad_stride, const void* x,
                                    int64_t x_stride, const tt_block_weight* weight, int64_t M,
                                    void* grad_values, void* workspace, tt_stream stream) {
  if (weight == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a weight, got NULL", kOp);
  const tt_block_weight& w = *weight;
  const tt_status status = check(grad, grad_stride, x, x_stride, w, M, grad_values, workspace);
  if (status != TT_OK || empty(w)) return status;
  const int64_t size = dtype_bytes(w.dtype);
  BlockGradParams p = {};
  p.grad = static_cast<const char*>(grad);
  p.grad_stride = M > 1 ? grad_stride * size : 0;
  p.x = static_cast<const char*>(x);
  p.x_stride = M > 1 ? x_stride * size : 0;
  p.crow = w.crow;
  p.col = w.col;
  p.blocks = int32_t(w.blocks);
  p.rows = int32_t(rows_of(w));
  p.bn = int32_t(w.bn);
  p.bk = int32_t(w.bk);
  p.M = int32_t(M);
  p.N = int32_t(w.N);
  p.K = int32_t(w.K);
  p.tiles_k = int32_t(tiles_k_of(w));
  p.steps = int32_t(steps_of(w, M));
  p.parts = int32_t(parts_of(w, M));
  p.values = grad_values;
  p.partial = static_cast<float*>(workspace);
  switch (w.dtype) {
    case TT_F32: return launch_typed<float>(w, p, stream);
    case TT_BF16: return launch_typed<bf16>(w, p, stream);
    default: return launch_typed<fp16>(w, p, stream);
  }
}
