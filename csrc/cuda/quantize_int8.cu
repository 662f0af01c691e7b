// quantize_int8: symmetric int8 with one fp32 scale a row (NUMERICS.md section 2).
//
//   scale[m] = max_k |x[m,k]| / 127;   q[m,k] = rne(x[m,k] * (127 / absmax))
#include "cuda/quantize_int8.cuh"

#include <trimtab/quantize_int8.h>

#include "cuda/quantize_rows.cuh"

namespace trimtab {
namespace {

template <class T>
struct PlainSource {
  static constexpr int kSharedBytes = sizeof(QuantizeShared);
  static constexpr int kMaxTeam = trimtab::kMaxTeam;
  static constexpr bool kWholeTeam = false;
  using Raw = RawChunk<T>;

  struct Row {
    const T* x;
    template <bool kWide>
    TT_DEVICE void load(int64_t k, int64_t K, Raw& raw) const {
      load_chunk<kWide>(x, k, K, raw);
    }
    template <bool kBlockRow, bool kWide>
    TT_DEVICE void prepare(int64_t, int, int, const Raw (&)[kTileChunks]) {}
    TT_DEVICE void values(const Raw& raw, float (&y)[kChunk]) const {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) y[j] = element(raw, j);
    }
  };

  const T* x;  // [M, K]
  int64_t stride;

  TT_DEVICE Row row(int64_t m) const { return {x + m * stride}; }
};

template <class T>
tt_status launch_typed(const char* op, const QuantizeArgs& a, tt_stream stream) {
  QuantizeParams<PlainSource<T>> p;
  p.source = {static_cast<const T*>(a.x), a.x_stride};
  p.M = a.M;
  p.K = a.K;
  p.columns = a.q_columns > a.K ? a.q_columns : a.K;
  p.q = a.q;
  p.q_stride = a.q_stride;
  p.scale = a.scale;
  p.zero = a.zero;
  p.zero_words = a.zero_words;
  const bool wide = aligned_rows(a.x, a.x_stride * int64_t{sizeof(T)}, a.M, 16);
  return launch_quantize_rows(op, p, wide, stream);
}

}  // namespace

tt_status launch_quantize_int8(const char* op, const QuantizeArgs& args, tt_stream stream) {
  switch (args.x_dtype) {
    case TT_BF16: return launch_typed<bf16>(op, args, stream);
    case TT_F16: return launch_typed<fp16>(op, args, stream);
    default: return launch_typed<float>(op, args, stream);
  }
}

}  // namespace trimtab

using namespace trimtab;

tt_status tt_quantize_int8_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride, int64_t M,
                                int64_t K, int8_t* q, int64_t q_stride, float* scale,
                                tt_stream stream) {
  constexpr const char* kOp = "quantize_int8";
  if (x_dtype != TT_F32 && x_dtype != TT_BF16 && x_dtype != TT_F16)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, got dtype %d", kOp, x_dtype);
  if (M < 0 || K < 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld K=%lld", kOp,
                     (long long)M, (long long)K);
  if (M > 0 && (scale == nullptr || (K > 0 && (x == nullptr || q == nullptr))))
    return set_error(TT_INVALID_ARGUMENT, "%s: x, q or scale is NULL", kOp);
  const QuantizeArgs args = {x, x_dtype, x_stride, M, K, q, q_stride, K, scale, nullptr, 0};
  return launch_quantize_int8(kOp, args, stream);
}
