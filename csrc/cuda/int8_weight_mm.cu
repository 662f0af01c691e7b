// int8_weight_mm for few rows: float x [M, K] times an int8 weight b [N, K], transposed.
//
//   t[m,n] = sum_g scale[g,n] * sum_(k in g) x[m,k] * (b[n,k] - zero_point[g,n])
//   out[m,n] = round(act(t + bias[n]))
//
// Reading the weight is the cost. A block owns 16 or 32 rows of it, its warps take turns along K, 64
// columns (a window) a turn, and meet once at the end to add their sums in a fixed order. Nothing is
// staged in shared memory: no element of b or x is used by two warps of a block.
//
// The product runs on tensor cores in bf16, where nothing is lost: b - zero_point has at most eight
// bits, and x is a sum of one (bf16), two (fp16) or three (fp32) bf16 numbers. On the fp32 units eight rows
// would take longer than reading the weight.
//
// The sum may take k in any order, so the fragments' order is the memory's: lane 4 g + t of a warp loads 16
// adjacent bytes, k = 16 t .. 16 t + 15 of the window, of weight rows g and g + 8 and 16 elements of x's
// row g. Step s of four multiplies elements 4 s .. 4 s + 3 of each lane.
#include <trimtab/int8_weight_mm.h>

#include "cuda/float_chunk.cuh"
#include "cuda/int8_epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_weight_mm";
constexpr int kWindow = 64;  // columns a warp takes a turn
constexpr int kLaneK = 16;  // of them a lane's
constexpr int kMaxWarps = 16;

// bf16 numbers that add up to one element of x.
template <class T>
constexpr int kParts = sizeof(T) == 4 ? 3 : 2;
template <>
constexpr int kParts<bf16> = 1;

template <class T>
struct WeightMmParams {
  const T* x;  // [M, K], rows x_stride elements apart
  int64_t x_stride;
  const int8_t* b;  // [N, K], rows b_stride bytes apart
  int64_t b_stride;
  const int8_t* zero_point;  // [groups, N] or NULL
  int32_t K, group;
  EpilogueParams epilogue;  // b_scale [groups, N]
};

// kNTiles: tiles of 16 weight rows a block;  kMTiles: tiles of 8 rows of x
template <class T_, int kNTiles_, int kMTiles_, bool kGrouped_, bool kWide_>
struct Config {
  using T = T_;
  static constexpr int kNTiles = kNTiles_, kMTiles = kMTiles_;
  static constexpr bool kGrouped = kGrouped_;  // more than one scale a weight row
  static constexpr bool kWide = kWide_;  // rows of b and x are aligned to 16 bytes
  // Windows on their way at once a warp: as many as 128 registers hold.
  static constexpr int kDepth = !kWide ? 1 : kNTiles * kMTiles * sizeof(T) == 2 ? 3 : 2;
};

// Where a lane's rows start: weight row n of b, then every eighth; row m of x, then every eighth.
template <class T>
struct Lane {
  int n, m, t;
  const int8_t* b;
  const T* x;
};

// What a lane loads of a window.
template <class C>
struct Window {
  Bytes16 b[2 * C::kNTiles];
  RawChunk<typename C::T> x[C::kMTiles][2];
};

// One group's scale and 2^23 + 128 + zero_point (see code_pair) of a lane's weight rows.
template <class C>
struct Group {
  float scale[2 * C::kNTiles], offset[2 * C::kNTiles];
};

template <class C>
using Sums = float[C::kNTiles][C::kMTiles][4];

template <class C>
TT_DEVICE void load_group(const WeightMmParams<typename C::T>& p, int n, int group, Group<C>& out) {
#pragma unroll
  for (int i = 0; i < 2 * C::kNTiles; ++i) {
    const bool inside = n + 8 * i < p.epilogue.N;
    const int64_t at = int64_t{group} * p.epilogue.N + n + 8 * i;
    const int zero = inside && p.zero_point != nullptr ? load_global(p.zero_point + at) : 0;
    out.scale[i] = C::kGrouped && inside ? load_global(p.epilogue.b_scale + at) : 0.0f;
    out.offset[i] = static_cast<float>(8388608 + 128 + zero);
  }
}

// 16 bytes of a weight row, the first `count` of them, then zeros.
TT_DEVICE Bytes16 load_bytes(const int8_t* from, int count) {
  Bytes16 v = {};
#pragma unroll
  for (int j = 0; j < kLaneK; ++j)
    if (j < count) v.word[j / 4] |= uint32_t{uint8_t(load_global(from + j))} << j % 4 * 8;
  return v;
}

// kWhole: all 64 columns exist, aligned to 16 bytes.
template <class C, bool kWhole>
TT_DEVICE void load_window(const WeightMmParams<typename C::T>& p, const Lane<typename C::T>& lane,
                           int k_begin, Window<C>& window) {
  using T = typename C::T;
  const int k = k_begin + lane.t * kLaneK;
#pragma unroll
  for (int i = 0; i < 2 * C::kNTiles; ++i) {
    const int8_t* from = lane.b + 8 * i * p.b_stride + k;
    window.b[i] = {};
    if (lane.n + 8 * i >= p.epilogue.N) continue;
    window.b[i] = kWhole ? load16(from) : load_bytes(from, p.K - k);
  }
#pragma unroll
  for (int j = 0; j < 2 * C::kMTiles; ++j) {
    const T* from = lane.x + j / 2 * 8 * p.x_stride + k + j % 2 * kChunk;
    const int count = lane.m + j / 2 * 8 < p.epilogue.M ? p.K - k - j % 2 * kChunk : 0;
    if constexpr (kWhole) load_whole_chunk(from, count > 0, window.x[j / 2][j % 2]);
    else load_chunk<false>(from, 0, count, window.x[j / 2][j % 2]);
  }
}

// bf16 of two of a word's four codes, `first` and the next; the word's bytes are codes + 128. A byte
// below the exponent of 2^23 is the float 2^23 + byte; what is left after taking away 2^23 + 128 +
// zero_point has eight bits and stands whole in the upper half.
TT_DEVICE uint32_t code_pair(uint32_t word, int first, float offset) {
  const uint32_t low = __byte_perm(word, 0x4b000000u, 0x7550u + first);
  const uint32_t high = __byte_perm(word, 0x4b000000u, 0x7551u + first);
  const F32x1 a = F32x1(float_from_bits(low)) - F32x1(offset);
  const F32x1 b = F32x1(float_from_bits(high)) - F32x1(offset);
  return __byte_perm(float_bits(a.v), float_bits(b.v), 0x7632u);
}

// The largest bf16 not beyond x; rest: x minus it, exact. An x that is not finite is passed on alone.
TT_DEVICE uint32_t cut_bf16(float x, float& rest) {
  const bool finite = (float_bits(x) & 0x7f800000u) != 0x7f800000u;
  const uint32_t top = float_bits(x) & 0xffff0000u;
  rest = finite ? (F32x1(x) - F32x1(float_from_bits(top))).v : 0.0f;
  return finite ? top >> 16 : to_bf16(x).bits;
}

// Elements 4 s .. 4 s + 3 of a lane's 16 as two bf16 pairs, part by part.
TT_DEVICE void split(const RawChunk<bf16> (&raw)[2], int s, uint32_t (&pairs)[1][2]) {
  pairs[0][0] = raw[s / 2].part[0].word[s % 2 * 2];
  pairs[0][1] = raw[s / 2].part[0].word[s % 2 * 2 + 1];
}
template <class T>
TT_DEVICE void split(const RawChunk<T> (&raw)[2], int s, uint32_t (&pairs)[kParts<T>][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float low = element(raw[s / 2], s % 2 * 4 + 2 * i);
    float high = element(raw[s / 2], s % 2 * 4 + 2 * i + 1);
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      const uint32_t bits = cut_bf16(low, low);
      pairs[part][i] = cut_bf16(high, high) << 16 | bits;
    }
  }
}

// sums += the window's products; of the lane's 16 elements those from first to end alone, in fours.
template <class C>
TT_DEVICE void multiply(const Window<C>& window, const Group<C>& group, int first, int end,
                        Sums<C>& sums) {
  constexpr int kPairs = kParts<typename C::T>;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    uint32_t x[C::kMTiles][kPairs][2];
#pragma unroll
    for (int j = 0; j < C::kMTiles; ++j) {
      split(window.x[j], s, x[j]);
      const uint32_t keep = 4 * s >= first && 4 * s < end ? 0xffffffffu : 0u;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) x[j][i / 2][i % 2] &= keep;
    }
#pragma unroll
    for (int i = 0; i < C::kNTiles; ++i) {
      const uint32_t upper = window.b[2 * i].word[s] ^ 0x80808080u;
      const uint32_t lower = window.b[2 * i + 1].word[s] ^ 0x80808080u;
      const float* offset = group.offset + 2 * i;
      const uint32_t a[4] = {code_pair(upper, 0, offset[0]), code_pair(lower, 0, offset[1]),
                             code_pair(upper, 2, offset[0]), code_pair(lower, 2, offset[1])};
#pragma unroll
      for (int j = 0; j < C::kMTiles; ++j)
#pragma unroll
        for (int part = 0; part < kPairs; ++part) mma_bf16(sums[i][j], a, x[j][part]);
    }
  }
}

// The same in groups, each with its own scale: most windows lie in one.
template <class C>
TT_DEVICE void multiply_groups(const WeightMmParams<typename C::T>& p,
                               const Lane<typename C::T>& lane, int k_begin,
                               const Window<C>& window, Group<C>& group, Sums<C>& sums) {
  const int k_last = p.K - k_begin < kWindow ? p.K - 1 : k_begin + kWindow - 1;
  const int last = k_last / p.group;
  for (int at = k_begin / p.group;;) {
    Sums<C> part = {};
    // May lie before the lane's elements, or behind.
    const int first = at * p.group - k_begin - lane.t * kLaneK;
    multiply<C>(window, group, first, first + p.group, part);
#pragma unroll
    for (int i = 0; i < C::kNTiles; ++i)
#pragma unroll
      for (int j = 0; j < C::kMTiles; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const F32x1 scaled = F32x1(part[i][j][r]) * F32x1(group.scale[2 * i + r / 2]);
          sums[i][j][r] = (scaled + F32x1(sums[i][j][r])).v;
        }
    if (++at > last) return;
    load_group(p, lane.n, at, group);
  }
}

template <class C>
TT_DEVICE void take_window(const WeightMmParams<typename C::T>& p, const Lane<typename C::T>& lane,
                           int k_begin, const Window<C>& window, Group<C>& group, Sums<C>& sums) {
  if (C::kGrouped) multiply_groups<C>(p, lane, k_begin, window, group, sums);
  else multiply<C>(window, group, 0, kLaneK, sums);
}

// This warp's sums over its windows: the whole ones in turn, kDepth of them on their way, and what is left
// of K by the warp whose turn it is.
template <class C>
TT_DEVICE void sum_windows(const WeightMmParams<typename C::T>& p, const Lane<typename C::T>& lane,
                           int warp, int warps, Sums<C>& sums) {
  constexpr int kGroups = C::kGrouped ? C::kDepth : 1;
  Window<C> ring[C::kDepth];
  Group<C> groups[kGroups];
  const int whole = C::kWide ? p.K / kWindow : 0, windows = (p.K + kWindow - 1) / kWindow;
  const auto load = [&](int w, int d) {
    if (w >= whole) return;
    load_window<C, true>(p, lane, w * kWindow, ring[d]);
    if (C::kGrouped) load_group(p, lane.n, w * kWindow / p.group, groups[d % kGroups]);
  };
  if (!C::kGrouped) load_group(p, lane.n, 0, groups[0]);
#pragma unroll
  for (int d = 0; d < C::kDepth; ++d) load(warp + d * warps, d);
  int w = warp;
  while (w < whole) {
#pragma unroll
    for (int d = 0; d < C::kDepth; ++d, w += warps) {
      if (w >= whole) break;
      take_window<C>(p, lane, w * kWindow, ring[d], groups[d % kGroups], sums);
      load(w + C::kDepth * warps, d);
    }
  }
  for (; w < windows; w += warps) {
    load_window<C, false>(p, lane, w * kWindow, ring[0]);
    if (C::kGrouped) load_group(p, lane.n, w * kWindow / p.group, groups[0]);
    take_window<C>(p, lane, w * kWindow, ring[0], groups[0], sums);
  }
}

// Output (m, n) of the block: the warps' sums in their order, then the epilogue.
template <class C>
TT_DEVICE void finish(const WeightMmParams<typename C::T>& p, const float* shared, int warps,
                      int o) {
  constexpr int kBlockN = 16 * C::kNTiles, kSums = C::kNTiles * C::kMTiles * 4;
  const EpilogueParams& e = p.epilogue;
  const int n = o % kBlockN, m = o / kBlockN;
  const int out_n = int(blockIdx.x) * kBlockN + n, out_m = int(blockIdx.y) * 8 * C::kMTiles + m;
  if (out_n >= e.N || out_m >= e.M) return;
  // Sum (row of 16, column of 8) stands in lane 4 (row % 8) + column / 2.
  const int lane = n % 8 * 4 + m % 8 / 2;
  const int index = (n / 16 * C::kMTiles + m / 8) * 4 + n / 8 % 2 * 2 + m % 2;
  F32x1 sum(0.0f);
  for (int w = 0; w < warps; ++w) sum = sum + F32x1(shared[(w * kSums + index) * 32 + lane]);
  if (!C::kGrouped) sum = sum * F32x1(load_global(e.b_scale + out_n));
  float t[1] = {(sum + F32x1(load_bias(e, out_n))).v};
  activate_all(e.activation, t);
  const int64_t at = int64_t{out_m} * e.out_stride + out_n;
  if (e.out_dtype == TT_F32) store_global(static_cast<float*>(e.out) + at, t[0]);
  else
    store_global(static_cast<uint16_t*>(e.out) + at,
                 static_cast<uint16_t>(round_to_16_bits(e.out_dtype, t[0])));
}

template <class C>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    weight_mm_kernel(const __grid_constant__ WeightMmParams<typename C::T> p) {
  constexpr int kSums = C::kNTiles * C::kMTiles * 4;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int n = int(blockIdx.x) * 16 * C::kNTiles + lane / 4;
  const int m = int(blockIdx.y) * 8 * C::kMTiles + lane / 4;
  const Lane<typename C::T> mine = {n, m, lane % 4, p.b + n * p.b_stride, p.x + m * p.x_stride};
  Sums<C> sums = {};
  sum_windows<C>(p, mine, warp, warps, sums);
  float* shared = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    shared[(warp * kSums + i) * 32 + lane] = sums[i / 4 / C::kMTiles][i / 4 % C::kMTiles][i % 4];
  __syncthreads();
  for (int o = threadIdx.x; o < 32 * kSums; o += blockDim.x) finish<C>(p, shared, warps, o);
}

template <class C>
tt_status launch_config(const WeightMmParams<typename C::T>& p, int sm_count, tt_stream stream) {
  constexpr int kSums = C::kNTiles * C::kMTiles * 4, kBlockN = 16 * C::kNTiles;
  const int64_t blocks = (int64_t{p.epilogue.N} + kBlockN - 1) / kBlockN;
  const int passes = (p.epilogue.M + 8 * C::kMTiles - 1) / (8 * C::kMTiles);
  // 16 warps an SM keep enough bytes on their way: two blocks of eight, or one of 16.
  const int warps = blocks * passes >= 2 * sm_count ? 8 : kMaxWarps;
  const LaunchShape shape = {dim3(unsigned(blocks), unsigned(passes)), dim3(unsigned(32 * warps)),
                             warps * kSums * 32 * 4};
  return launch(kOp, weight_mm_kernel<C>, shape, p, stream);
}

// Two weight tiles a block halve what is read of x. One does where two would leave processors idle, and
// where a group's scales take the registers. Where eight rows of x fill them, more are taken in several
// passes.
template <class T>
tt_status launch_typed(const void* x, WeightMmParams<T> p, tt_stream stream) {
  p.x = static_cast<const T*>(x);
  DeviceFacts facts;
  const tt_status status = device_facts(kOp, &facts);
  if (status != TT_OK) return status;
  const int sms = facts.sm_count, M = p.epilogue.M, N = p.epilogue.N;
  const bool grouped = p.group < p.K;
  const bool wide = aligned_rows(x, p.x_stride * int64_t{sizeof(T)}, M, 16) &&
                    aligned_rows(p.b, p.b_stride, N, 16);
  if (!wide)
    return grouped ? launch_config<Config<T, 1, 1, true, false>>(p, sms, stream)
                   : launch_config<Config<T, 1, 1, false, false>>(p, sms, stream);
  if constexpr (sizeof(T) == 2) {
    if (M > 8 && !(grouped && kParts<T> > 1))
      return grouped ? launch_config<Config<T, 1, 3 - kParts<T>, true, true>>(p, sms, stream)
                     : launch_config<Config<T, 2, 2, false, true>>(p, sms, stream);
    if (!grouped && N >= 32 * sms)
      return launch_config<Config<T, 2, 1, false, true>>(p, sms, stream);
  }
  return grouped ? launch_config<Config<T, 1, 1, true, true>>(p, sms, stream)
                 : launch_config<Config<T, 1, 1, false, true>>(p, sms, stream);
}

tt_status check(const void* x, tt_dtype x_dtype, const int8_t* b, int64_t group, int64_t M,
                int64_t N, int64_t K, const tt_epilogue* e) {
  constexpr int64_t kMost = INT32_MAX - kWindow;
  if (M < 0 || N < 0 || K < 0 || N > kMost || K > kMost)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected sizes from 0 to 2^31 - 65, got M=%lld N=%lld K=%lld", kOp,
                     (long long)M, (long long)N, (long long)K);
  if (x_dtype != TT_F32 && x_dtype != TT_BF16 && x_dtype != TT_F16)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected x of float32, bfloat16 or float16, got dtype %d", kOp, x_dtype);
  if (e == nullptr || (M > 0 && N > 0 && (e->out == nullptr || e->b_scale == nullptr)))
    return set_error(TT_INVALID_ARGUMENT, "%s: epilogue, its out or its b_scale is NULL", kOp);
  if (e->out_dtype != TT_F32 && e->out_dtype != TT_BF16 && e->out_dtype != TT_F16)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected out of float32, bfloat16 or float16, got dtype %d", kOp,
                     e->out_dtype);
  if (M > 0 && N > 0 && K > 0 && (x == nullptr || b == nullptr))
    return set_error(TT_INVALID_ARGUMENT, "%s: x or b is NULL", kOp);
  if (group < 1 && K > 0)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected group_size >= 1, got %lld", kOp,
                     (long long)group);
  if (group < K && group % 4 != 0)
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected group_size to be a multiple of 4, or K=%lld or more, got %lld",
                     kOp, (long long)K, (long long)group);
  if (M > TT_INT8_WEIGHT_MM_CUDA_MAX_M)
    return set_error(TT_UNSUPPORTED, "%s: expected at most %d rows on a CUDA device, got M=%lld",
                     kOp, TT_INT8_WEIGHT_MM_CUDA_MAX_M, (long long)M);
  return TT_OK;
}

template <class T>
WeightMmParams<T> params(int64_t x_stride, const int8_t* b, int64_t b_stride, int64_t group,
                         const int8_t* zero_point, int64_t M, int64_t N, int64_t K,
                         const tt_epilogue& epilogue) {
  WeightMmParams<T> p;
  p.x = nullptr;
  p.x_stride = x_stride;
  p.b = b;
  p.b_stride = b_stride;
  p.zero_point = zero_point;
  p.K = int32_t(K);
  p.group = int32_t(group < K ? group : K);
  p.epilogue = epilogue_params(nullptr, M, N, epilogue);
  return p;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_weight_mm_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride, const int8_t* b,
                                 int64_t b_stride, int64_t group, const int8_t* zero_point,
                                 int64_t M, int64_t N, int64_t K, const tt_epilogue* epilogue,
                                 tt_stream stream) {
  const tt_status status = check(x, x_dtype, b, group, M, N, K, epilogue);
  if (status != TT_OK || M == 0 || N == 0) return status;
  const auto run = [&](auto p) { return launch_typed(x, p, stream); };
  const auto of = [&](auto type) {
    return params<decltype(type)>(x_stride, b, b_stride, group, zero_point, M, N, K, *epilogue);
  };
  switch (x_dtype) {
    case TT_BF16: return run(of(bf16{}));
    case TT_F16: return run(of(fp16{}));
    default: return run(of(float{}));
  }
}
