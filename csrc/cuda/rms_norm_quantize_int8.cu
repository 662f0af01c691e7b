// rms_norm_quantize_int8: RMSNorm, quantized on its way out (csrc/math/rms_norm.h).
//
//   r = 1 / sqrt(mean_k x[m,k]^2 + eps);  y[m,k] = (x[m,k] * r) * weight[k]
//   q, scale = quantize_int8(y)
#include <trimtab/rms_norm_quantize_int8.h>

#include "cuda/quantize_rows.cuh"
#include "math/rms_norm.h"

namespace trimtab {
namespace {

static_assert(kRmsChunk == kChunk, "a thread adds up its own chunk");

struct RmsShared {
  QuantizeShared quantize;  // first, where block_max looks
  float chunk[kRmsChunks];
};

// T: of x;  W: of the weight
template <class T, class W>
struct RmsNormSource {
  static constexpr int kSharedBytes = sizeof(RmsShared);
  // A thread owns partials 8 t .. 8 t + 7: chunk c of the row belongs to thread c mod 256.
  static constexpr int kMaxTeam = kRmsChunks;
  static constexpr bool kWholeTeam = true;

  struct Raw {
    RawChunk<T> x;
    RawChunk<W> weight;
  };

  struct Row {
    const T* x;
    const W* weight;
    float eps;
    float r;

    template <bool kWide>
    TT_DEVICE void load(int64_t k, int64_t K, Raw& raw) const {
      load_chunk<kWide>(x, k, K, raw.x);
      load_chunk<kWide>(weight, k, K, raw.weight);
    }

    TT_DEVICE static void add_squares(const RawChunk<T>& raw, float (&partial)[kChunk]) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const F32x1 value(element(raw, j));
        partial[j] = (F32x1(partial[j]) + value * value).v;
      }
    }

    // Chunk sums lane, lane + 32, .. in halves, then across the lanes; the same in all of them.
    TT_DEVICE static float fold(const float (&chunk)[8]) {
      F32x1 sum[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = chunk[i];
#pragma unroll
      for (int half = 4; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        sum[0] = sum[0] + F32x1(__shfl_xor_sync(kAllLanes, sum[0].v, lanes));
      return sum[0].v;
    }

    // Sets r. raw: the first tile; of a longer row the others are read here too.
    template <bool kBlockRow, bool kWide>
    TT_DEVICE void prepare(int64_t K, int me, int team, const Raw (&raw)[kTileChunks]) {
      float chunk[8] = {};
      if (kBlockRow) {
        float partial[kChunk] = {};
#pragma unroll
        for (int v = 0; v < kTileChunks; ++v) add_squares(raw[v].x, partial);
        for (int64_t k = (int64_t{kTileChunks} * team + me) * kChunk; k < K; k += team * kChunk) {
          RawChunk<T> more;
          load_chunk<kWide>(x, k, K, more);
          add_squares(more, partial);
        }
        // The barrier of block_max stands between these reads and the next row's writes.
        float* sums = reinterpret_cast<RmsShared*>(shared_memory())->chunk;
        sums[me] = rms_chunk_sum(partial);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i) chunk[i] = sums[me % 32 + 32 * i];
      } else {
        // A warp's row has at most 128 chunks, so every partial is one square.
#pragma unroll
        for (int v = 0; v < kTileChunks; ++v) {
          float partial[kChunk] = {};
          add_squares(raw[v].x, partial);
          chunk[v] = rms_chunk_sum(partial);
        }
      }
      // Zeros past the end stay zeros: where r is Inf or NaN the row's own values are no better. A row of
      // none has a mean of 0 / 0.
      r = K == 0 ? 0.0f : rms_factor(fold(chunk), K, eps);
    }

    TT_DEVICE void values(const Raw& raw, float (&y)[kChunk]) const {
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        y[j] = rms_scaled(F32x1(element(raw.x, j)), F32x1(r), F32x1(element(raw.weight, j))).v;
    }
  };

  const T* x;  // [M, K]
  int64_t stride;
  const W* weight;  // [K]
  float eps;

  TT_DEVICE Row row(int64_t m) const { return {x + m * stride, weight, eps, 0.0f}; }
};

struct Arguments {
  const void* x;
  int64_t x_stride;
  const void* weight;
  float eps;
  int64_t M, K;
  int8_t* q;
  int64_t q_stride;
  float* scale;
};

template <class T, class W>
tt_status launch_typed(const char* op, const Arguments& a, tt_stream stream) {
  QuantizeParams<RmsNormSource<T, W>> p;
  p.source = {static_cast<const T*>(a.x), a.x_stride, static_cast<const W*>(a.weight), a.eps};
  p.M = a.M;
  p.K = p.columns = a.K;
  p.q = a.q;
  p.q_stride = a.q_stride;
  p.scale = a.scale;
  p.zero = nullptr;
  p.zero_words = 0;
  const bool wide = aligned_rows(a.x, a.x_stride * int64_t{sizeof(T)}, a.M, 16) &&
                    aligned_rows(a.weight, 0, 1, 16);
  return launch_quantize_rows(op, p, wide, stream);
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_rms_norm_quantize_int8_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                         const void* weight, tt_dtype weight_dtype, float eps,
                                         int64_t M, int64_t K, int8_t* q, int64_t q_stride,
                                         float* scale, tt_stream stream) {
  constexpr const char* kOp = "rms_norm_quantize_int8";
  if (x_dtype != TT_F32 && x_dtype != TT_BF16 && x_dtype != TT_F16)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, got dtype %d", kOp, x_dtype);
  if (weight_dtype != TT_F32 && weight_dtype != x_dtype)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected weight of float32 or x's dtype %d, got dtype %d", kOp, x_dtype,
                     weight_dtype);
  if (M < 0 || K < 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected sizes >= 0, got M=%lld K=%lld", kOp,
                     (long long)M, (long long)K);
  if (M > 0 && (scale == nullptr || (K > 0 && (x == nullptr || weight == nullptr || q == nullptr))))
    return set_error(TT_INVALID_ARGUMENT, "%s: x, weight, q or scale is NULL", kOp);
  const Arguments a = {x, x_stride, weight, eps, M, K, q, q_stride, scale};
  const bool wide_weight = weight_dtype == TT_F32;
  switch (x_dtype) {
    case TT_BF16:
      return wide_weight ? launch_typed<bf16, float>(kOp, a, stream)
                         : launch_typed<bf16, bf16>(kOp, a, stream);
    case TT_F16:
      return wide_weight ? launch_typed<fp16, float>(kOp, a, stream)
                         : launch_typed<fp16, fp16>(kOp, a, stream);
    default: return launch_typed<float, float>(kOp, a, stream);
  }
}
