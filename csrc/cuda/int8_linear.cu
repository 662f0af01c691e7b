// int8_linear on a CUDA device: quantize_int8 into the workspace, int8_mm from it.
//
// Workspace, each part a multiple of 256 bytes:
//   q [M, K] int8, rows round_up(K, 16) bytes apart, zeros behind K
//   scale [M] fp32
//   int8_mm's own; the first launch zeroes its counters in passing, so that two launches are all
#include <trimtab/int8_linear.h>

#include "cuda/int8_mm.cuh"
#include "cuda/quantize_int8.cuh"

namespace trimtab {
namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

int64_t q_stride(int64_t K) { return round_up(K, 16); }
int64_t q_bytes(int64_t M, int64_t K) { return round_up(M * q_stride(K), 256); }
int64_t scale_bytes(int64_t M) { return round_up(M * int64_t(sizeof(float)), 256); }

// Sizes the op refuses take nothing: the message comes from the op.
bool sizes_valid(int64_t M, int64_t N, int64_t K) {
  return M > 0 && M < INT32_MAX && N > 0 && N < INT32_MAX && K >= 0 && K <= TT_INT8_MAX_K;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_int8_linear_cuda_workspace(int64_t M, int64_t N, int64_t K) {
  if (!sizes_valid(M, N, K)) return 0;
  return q_bytes(M, K) + scale_bytes(M) + int8_mm_workspace_bytes(M, N, K);
}

tt_status tt_int8_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride, const int8_t* b,
                              int64_t b_stride, int64_t M, int64_t N, int64_t K,
                              const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  const char* op = "int8_linear";
  tt_status status = check_int8_mm_cuda(op, M, N, K, b, b_stride, epilogue, workspace,
                                        tt_int8_linear_cuda_workspace(M, N, K));
  if (status != TT_OK || M == 0 || N == 0) return status;
  if (x_dtype != TT_F32 && x_dtype != TT_BF16 && x_dtype != TT_F16)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, got dtype %d", op,
                     int(x_dtype));
  if (x == nullptr && K > 0) return set_error(TT_INVALID_ARGUMENT, "%s: expected x, got NULL", op);
  if (M > 1 && x_stride < K)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected x_stride >= K=%lld, got %lld", op,
                     (long long)K, (long long)x_stride);

  char* q = static_cast<char*>(workspace);
  char* scale = q + q_bytes(M, K);
  Int8MmArgs args = {};
  args.a = reinterpret_cast<int8_t*>(q);
  args.a_stride = q_stride(K);
  args.a_scale = reinterpret_cast<float*>(scale);
  args.b = b;
  args.b_stride = b_stride;
  args.M = M;
  args.N = N;
  args.K = K;
  args.epilogue = *epilogue;
  int8_mm_take_workspace(scale + scale_bytes(M), &args);
  args.counters_are_zero = true;

  QuantizeArgs quantize = {};
  quantize.x = x;
  quantize.x_dtype = x_dtype;
  quantize.x_stride = x_stride;
  quantize.M = M;
  quantize.K = K;
  quantize.q = reinterpret_cast<int8_t*>(q);
  quantize.q_stride = q_stride(K);
  quantize.q_columns = q_stride(K);
  quantize.scale = reinterpret_cast<float*>(scale);
  quantize.zero = args.counters;
  quantize.zero_words = args.counters == nullptr ? 0 : kSplitCounters;
  status = launch_quantize_int8(op, quantize, stream);
  return status == TT_OK ? launch_int8_mm(op, args, stream) : status;
}
