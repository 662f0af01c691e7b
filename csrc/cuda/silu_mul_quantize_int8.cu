// silu_mul_quantize_int8: a gated activation, quantized on its way out.
//
//   y[m,k] = silu(gate[m,k]) * up[m,k];   q, scale = quantize_int8(y)
#include <trimtab/silu_mul_quantize_int8.h>

#include "cuda/quantize_rows.cuh"
#include "math/activation.h"

namespace trimtab {
namespace {

template <class T>
struct SiluMulSource {
  static constexpr int kSharedBytes = sizeof(QuantizeShared);
  static constexpr int kMaxTeam = 512;  // 128 registers, for two operands
  static constexpr bool kWholeTeam = false;

  struct Raw {
    RawChunk<T> gate, up;
  };

  struct Row {
    const T *gate, *up;
    template <bool kWide>
    TT_DEVICE void load(int64_t k, int64_t K, Raw& raw) const {
      load_chunk<kWide>(gate, k, K, raw.gate);
      load_chunk<kWide>(up, k, K, raw.up);
    }
    template <bool kBlockRow, bool kWide>
    TT_DEVICE void prepare(int64_t, int, int, const Raw (&)[kTileChunks]) {}
    TT_DEVICE void values(const Raw& raw, float (&y)[kChunk]) const {
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        y[j] = (silu(F32x1(element(raw.gate, j))) * F32x1(element(raw.up, j))).v;
    }
  };

  const T *gate, *up;  // [M, K]
  int64_t gate_stride, up_stride;

  TT_DEVICE Row row(int64_t m) const { return {gate + m * gate_stride, up + m * up_stride}; }
};

template <class T>
tt_status launch_typed(const char* op, const void* gate, int64_t gate_stride, const void* up,
                       int64_t up_stride, QuantizeParams<SiluMulSource<T>> p, tt_stream stream) {
  p.source = {static_cast<const T*>(gate), static_cast<const T*>(up), gate_stride, up_stride};
  const bool wide = aligned_rows(gate, gate_stride * int64_t{sizeof(T)}, p.M, 16) &&
                    aligned_rows(up, up_stride * int64_t{sizeof(T)}, p.M, 16);
  return launch_quantize_rows(op, p, wide, stream);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_silu_mul_quantize_int8_cuda(const void* gate, int64_t gate_stride, const void* up,
                                         int64_t up_stride, tt_dtype dtype, int64_t M, int64_t K,
                                         int8_t* q, int64_t q_stride, float* scale,
                                         tt_stream stream) {
  constexpr const char* kOp = "silu_mul_quantize_int8";
  if (dtype != TT_F32 && dtype != TT_BF16 && dtype != TT_F16)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected gate and up of float32, bfloat16 or float16, got dtype %d", kOp,
                     dtype);
  if (M < 0 || K < 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld K=%lld", kOp,
                     (long long)M, (long long)K);
  if (M > 0 && (scale == nullptr || (K > 0 && (gate == nullptr || up == nullptr || q == nullptr))))
    return set_error(TT_INVALID_ARGUMENT, "%s: gate, up, q or scale is NULL", kOp);
  const auto run = [&](auto p) {
    p.M = M;
    p.K = p.columns = K;
    p.q = q;
    p.q_stride = q_stride;
    p.scale = scale;
    p.zero = nullptr;
    p.zero_words = 0;
    return launch_typed(kOp, gate, gate_stride, up, up_stride, p, stream);
  };
  switch (dtype) {
    case TT_BF16: return run(QuantizeParams<SiluMulSource<bf16>>{});
    case TT_F16: return run(QuantizeParams<SiluMulSource<fp16>>{});
    default: return run(QuantizeParams<SiluMulSource<float>>{});
  }
}
