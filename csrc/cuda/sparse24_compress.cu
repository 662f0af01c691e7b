// sparse24_compress on a CUDA device: checks and launch.
#include "cuda/sparse24_compress.cuh"

#include "cuda/launch.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "sparse24_compress";
constexpr int64_t kMost = INT32_MAX / 8;  // sizes and bytes of a row stay in 32 bits

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t size_of(tt_dtype dtype) {
  switch (dtype) {
    case TT_F32: return 4;
    case TT_BF16:
    case TT_F16: return 2;
    case TT_I8: return 1;
    default: return 0;
  }
}

bool aligned16(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 16 == 0;
}

tt_status check_out(const char* name, const tt_sparse24_compressed& out, tt_dtype dtype,
                    int64_t rows, int64_t columns) {
  const int64_t bytes = ceil_div(columns, 4) * 2 * size_of(dtype);
  if (out.values == nullptr || !aligned16(out.values, out.row_bytes) || out.row_bytes < bytes ||
      out.row_bytes > kMost)
    return set_error(
        TT_INVALID_ARGUMENT,
        "%s: expected %s values in rows of at least %lld bytes, a multiple of 16 apart, got %p and "
        "%lld bytes",
        kOp, name, (long long)bytes, out.values, (long long)out.row_bytes);
  if (out.metadata != nullptr && dtype == TT_F32)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected no metadata for float32, which has none",
                     kOp);
  return TT_OK;
}

Compress24Out out_of(const tt_sparse24_compressed& out, int64_t rows, int64_t columns) {
  const int64_t groups = ceil_div(columns, 4);
  return {static_cast<int8_t*>(out.values),
          out.row_bytes,
          out.indices,
          out.metadata,
          int32_t(rows),
          int32_t(groups),
          int32_t(ceil_div(groups, 2)),
          int32_t(ceil_div(columns, 64))};
}

template <class T>
tt_status launch_typed(Compress24Params p, bool both, tt_stream stream) {
  using Tile = Compress24Tile<T>;
  if (p.out.rows == 1) p.stride = 0;  // any, so that no address is odd
  const bool aligned = aligned16(p.weight, p.stride);
  const int64_t tiles_n = ceil_div(p.out.rows, Tile::kSide);
  p.tiles_k = int32_t(ceil_div(p.weight_bytes, 128));
  if (tiles_n * p.tiles_k > INT32_MAX)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected fewer than 2^31 tiles, got N=%d K=%d", kOp,
                     p.out.rows, p.transposed.rows);
  const LaunchShape shape = {dim3(unsigned(tiles_n * p.tiles_k)), dim3(kCompress24Threads),
                             Tile::kSharedBytes};
  if (both)
    return launch(kOp,
                  aligned ? sparse24_compress_kernel<T, true, true>
                          : sparse24_compress_kernel<T, false, true>,
                  shape, p, stream);
  return launch(kOp,
                aligned ? sparse24_compress_kernel<T, true, false>
                        : sparse24_compress_kernel<T, false, false>,
                shape, p, stream);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_sparse24_compress_cuda(const void* weight, tt_dtype dtype, int64_t stride, int64_t N,
                                    int64_t K, const tt_sparse24_compressed* out,
                                    const tt_sparse24_compressed* transposed, tt_stream stream) {
  const int64_t size = size_of(dtype);
  if (size == 0)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a weight of float32, bfloat16, float16 or int8, got dtype %d",
                     kOp, int(dtype));
  if (N < 0 || K < 0 || N > kMost / 4 || K > kMost / 4)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes from 0 to %lld, got N=%lld K=%lld",
                     kOp, (long long)(kMost / 4), (long long)N, (long long)K);
  if (N == 0 || K == 0) return TT_OK;
  if (weight == nullptr || out == nullptr)
    return set_error(TT_INVALID_ARGUMENT, "%s: weight or out is NULL", kOp);
  tt_status status = check_out("the", *out, dtype, N, K);
  if (status == TT_OK && transposed != nullptr)
    status = check_out("the transposed", *transposed, dtype, K, N);
  if (status != TT_OK) return status;
  Compress24Params p = {};
  p.weight = static_cast<const int8_t*>(weight);
  p.stride = stride * size;
  p.weight_bytes = int32_t(K * size);
  p.out = out_of(*out, N, K);
  if (transposed != nullptr) p.transposed = out_of(*transposed, K, N);
  switch (dtype) {
    case TT_F32: return launch_typed<float>(p, transposed != nullptr, stream);
    case TT_I8: return launch_typed<int8_t>(p, transposed != nullptr, stream);
    default:
      return launch_typed<uint16_t>(p, transposed != nullptr, stream);  // both have a sign on top
  }
}
