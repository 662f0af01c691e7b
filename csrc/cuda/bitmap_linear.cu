// bitmap_linear on a CUDA device: checks, and with int8 values quantize_int8 first.
//
// Workspace, for int8 values: q [M, K] int8 in rows of round_up(K, 16) bytes, then scale [M] fp32, each part
// a multiple of 256 bytes.
#include <trimtab/bitmap_linear.h>

#include "cuda/bitmap_mm.cuh"
#include "cuda/quantize_int8.cuh"
#include "cuda/sparse_check.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "bitmap_linear";

template <class C>
tt_status launch_config(const BitmapParams& from, tt_stream stream) {
  BitmapParams p = from;
  const int turns = (p.words + C::kWords - 1) / C::kWords;
  const int warps = turns < 1 ? 1 : turns < C::kWarps ? turns : C::kWarps;
  p.share = (turns + warps - 1) / warps * C::kWords;
  const int64_t blocks = ceil_div(p.epilogue.N, C::kRows);
  const int64_t passes = ceil_div(p.epilogue.M, 8 * C::kTokens);
  const LaunchShape shape = {dim3(unsigned(blocks), unsigned(passes)), dim3(unsigned(32 * warps)),
                             warps * C::kWarpShared + C::kTableBytes};
  return launch(kOp, bitmap_mm_kernel<C>, shape, p, stream);
}

// Two tiles of weight rows a block halve what is read of x, which matters where x has many rows. float32, by
// fma, has no registers for more than eight.
template <class T>
tt_status launch_typed(const BitmapParams& p, tt_stream stream) {
  if constexpr (sizeof(T) < 4) {
    if (p.epilogue.M > 16) return launch_config<BitmapConfig<T, 2, 4>>(p, stream);
    if (p.epilogue.M > 8) return launch_config<BitmapConfig<T, 2, 2>>(p, stream);
  }
  return launch_config<BitmapConfig<T, 1, 1>>(p, stream);
}

tt_status check(const void* x, tt_dtype x_dtype, int64_t x_stride, const tt_bitmap& w, int64_t M,
                int64_t N, int64_t K, const tt_epilogue* epilogue, const void* workspace) {
  tt_status status = check_sparse_cuda(kOp, x, x_dtype, x_stride, w.dtype, M, N, K, epilogue);
  if (status != TT_OK || M == 0 || N == 0) return status;
  if (M > TT_BITMAP_LINEAR_CUDA_MAX_M)
    return set_error(TT_UNSUPPORTED, "%s: expected at most %d rows on a CUDA device, got M=%lld",
                     kOp, TT_BITMAP_LINEAR_CUDA_MAX_M, (long long)M);
  if (w.count < 0 || (w.count > 0 && w.values == nullptr) || w.row_start == nullptr ||
      (K > 0 && w.bits == nullptr))
    return set_error(TT_INVALID_ARGUMENT, "%s: values, bits or row_start is NULL", kOp);
  if (reinterpret_cast<uintptr_t>(w.values) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(w.bits) % 8 != 0)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected values aligned to 16 bytes and bits to 8, got %p and %p", kOp,
                     w.values, static_cast<const void*>(w.bits));
  return check_workspace(kOp, workspace, tt_bitmap_linear_cuda_workspace(M, K, w.dtype));
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_bitmap_linear_cuda_workspace(int64_t M, int64_t K, tt_dtype values_dtype) {
  return quantized_bytes(M, K, values_dtype);
}

tt_status tt_bitmap_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                const tt_bitmap* weight, int64_t M, int64_t N, int64_t K,
                                const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  if (weight == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected a weight, got NULL", kOp);
  tt_status status = check(x, x_dtype, x_stride, *weight, M, N, K, epilogue, workspace);
  if (status != TT_OK || M == 0 || N == 0) return status;
  BitmapParams p = {};
  p.x = x;
  p.x_stride = x_stride;
  p.values = static_cast<const char*>(weight->values);
  p.count = weight->count;
  p.bits = reinterpret_cast<const uint64_t*>(weight->bits);
  p.row_start = weight->row_start;
  p.K = int32_t(K);
  p.words = int32_t(ceil_div(K, 64));
  const float* a_scale = nullptr;
  if (weight->dtype == TT_I8) {
    const QuantizedX q = quantized_x(workspace, M, K);
    status = launch_quantize_x(kOp, x, x_dtype, x_stride, M, K, q, stream);
    if (status != TT_OK) return status;
    p.x = q.codes;
    p.x_stride = q.stride;
    a_scale = q.scale;
  }
  p.epilogue = epilogue_params(a_scale, M, N, *epilogue);
  p.wide = aligned_rows(x, x_stride * dtype_bytes(x_dtype), M, 16);
  switch (weight->dtype) {
    case TT_F32: return launch_typed<float>(p, stream);
    case TT_BF16: return launch_typed<bf16>(p, stream);
    case TT_F16: return launch_typed<fp16>(p, stream);
    default: return launch_typed<int8_t>(p, stream);
  }
}
