// What the launchers of bitmap_linear and block_linear share: checks, and x as int8 codes in a workspace.
#pragma once
#include <trimtab/int8_mm.h>

#include "cuda/launch.cuh"
#include "cuda/quantize_int8.cuh"

namespace trimtab {
namespace {

// Sizes, and bytes of a row, stay in 32 bits up to a tile's end.
constexpr int64_t kMostSize = INT32_MAX / 8;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t dtype_bytes(tt_dtype dtype) { return dtype == TT_F32 ? 4 : dtype == TT_I8 ? 1 : 2; }
inline bool is_float(tt_dtype dtype) {
  return dtype == TT_F32 || dtype == TT_BF16 || dtype == TT_F16;
}

// x [M, K] and the epilogue of a weight [N, K] whose values are of values_dtype.
inline tt_status check_sparse_cuda(const char* op, const void* x, tt_dtype x_dtype,
                                   int64_t x_stride, tt_dtype values_dtype, int64_t M, int64_t N,
                                   int64_t K, const tt_epilogue* e) {
  const bool int8 = values_dtype == TT_I8;
  const int64_t most_k = int8 ? TT_INT8_MAX_K : kMostSize;
  if (M < 0 || N < 0 || K < 0 || M > kMostSize || N > kMostSize || K > most_k)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected M, N from 0 to %lld and K to %lld, got M=%lld N=%lld K=%lld", op,
                     (long long)kMostSize, (long long)most_k, (long long)M, (long long)N,
                     (long long)K);
  if (!is_float(x_dtype) || (!int8 && values_dtype != x_dtype))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16 and values of its dtype or "
                     "int8, got dtypes %d and %d",
                     op, int(x_dtype), int(values_dtype));
  if (e == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: expected an epilogue, got NULL", op);
  if (M == 0 || N == 0) return TT_OK;
  if ((x == nullptr && K > 0) || e->out == nullptr || int8 != (e->b_scale != nullptr))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x and out, and b_scale with int8 values alone, got %p, %p, %p",
                     op, x, e->out, static_cast<const void*>(e->b_scale));
  if (!is_float(e->out_dtype) || (e->bias != nullptr && !is_float(e->bias_dtype)))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected out and bias of float32, bfloat16 or float16, got dtypes %d, %d",
                     op, int(e->out_dtype), int(e->bias_dtype));
  if (e->activation < TT_ACT_NONE || e->activation > TT_ACT_SILU)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected an activation from %d to %d, got %d", op,
                     int(TT_ACT_NONE), int(TT_ACT_SILU), int(e->activation));
  if (M > 1 && (x_stride < 0 || e->out_stride < N))
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x_stride >= 0 and out_stride >= N=%lld, got %lld and %lld", op,
                     (long long)N, (long long)x_stride, (long long)e->out_stride);
  return TT_OK;
}

inline tt_status check_workspace(const char* op, const void* workspace, int64_t bytes) {
  if (bytes == 0 || (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 256 == 0))
    return TT_OK;
  return set_error(TT_INVALID_ARGUMENT,
                   "%s: expected a workspace of %lld bytes aligned to 256, got %p", op,
                   (long long)bytes, workspace);
}

// --- x as codes: rows of whole 16 bytes, zeros behind K, then the scales

struct QuantizedX {
  int8_t* codes;
  float* scale;
  int64_t stride;
};

inline int64_t codes_bytes(int64_t M, int64_t K) { return round_up(M * round_up(K, 16), 256); }

// Of a workspace; 0 where values are floats or the op refuses the sizes.
inline int64_t quantized_bytes(int64_t M, int64_t K, tt_dtype values_dtype) {
  if (values_dtype != TT_I8 || M <= 0 || M > kMostSize || K < 0 || K > TT_INT8_MAX_K) return 0;
  return codes_bytes(M, K) + round_up(M * int64_t(sizeof(float)), 256);
}

inline QuantizedX quantized_x(void* workspace, int64_t M, int64_t K) {
  char* codes = static_cast<char*>(workspace);
  return {reinterpret_cast<int8_t*>(codes), reinterpret_cast<float*>(codes + codes_bytes(M, K)),
          round_up(K, 16)};
}

inline tt_status launch_quantize_x(const char* op, const void* x, tt_dtype x_dtype,
                                   int64_t x_stride, int64_t M, int64_t K, const QuantizedX& q,
                                   tt_stream stream) {
  QuantizeArgs args = {};
  args.x = x;
  args.x_dtype = x_dtype;
  args.x_stride = x_stride;
  args.M = M;
  args.K = K;
  args.q = q.codes;
  args.q_stride = args.q_columns = q.stride;
  args.scale = q.scale;
  return launch_quantize_int8(op, args, stream);
}

}  // namespace
}  // namespace trimtab
