#include "cpu/sparse_epilogue.h"

#include "cpu/int8_product.h"
#include "cpu/status.h"

namespace trimtab {

tt_status check_sparse_epilogue(const char* op, const tt_epilogue* epilogue, bool int8, int64_t M,
                                int64_t N) {
  if (epilogue == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: epilogue is NULL", op);
  if (M == 0 || N == 0) return TT_OK;
  if (epilogue->out == nullptr || int8 != (epilogue->b_scale != nullptr)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected out, and b_scale with int8 values alone, got %p and %p", op,
                     epilogue->out, static_cast<const void*>(epilogue->b_scale));
  }
  if (dtype_size(epilogue->out_dtype) == 0 || epilogue->out_scale != nullptr ||
      (epilogue->bias != nullptr && dtype_size(epilogue->bias_dtype) == 0)) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected out and bias of float32, bfloat16 or float16", op);
  }
  if (epilogue->activation < TT_ACT_NONE || epilogue->activation > TT_ACT_SILU) {
    return set_error(TT_INVALID_ARGUMENT, "%s: unknown activation %d", op, epilogue->activation);
  }
  if (epilogue->out_stride < N && M > 1) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected out_stride >= N=%lld, got %lld", op,
                     (long long)N, (long long)epilogue->out_stride);
  }
  return TT_OK;
}

SparseOutput sparse_output(tt_isa isa, const tt_epilogue& epilogue, bool int8, const float* a_scale,
                           const float* bias) {
  const SparseLanes& lanes = sparse_lanes(isa);
  return {&lanes,
          int8 ? lanes.int8_epilogue(epilogue.activation, epilogue.out_dtype) : nullptr,
          lanes.float_epilogue(epilogue.activation, epilogue.out_dtype),
          a_scale,
          epilogue.b_scale,
          bias,
          static_cast<char*>(epilogue.out),
          epilogue.out_stride,
          dtype_size(epilogue.out_dtype)};
}

}  // namespace trimtab
