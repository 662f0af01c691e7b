// bitmap_linear's product for few rows of x, where reading the weight is the cost.
//
// Read are the bits, an eighth of a byte a column, and the kept values: at bf16 and 50 % kept 1.1 bytes a
// column, against the 2 of a dense weight. 4096 x 4096 are 19 MB, 5.6 us at 3.35 TB/s; decoding them may then
// take 2.4 clocks of a multiprocessor a column of 32 lanes, ten instructions.
//
// A block owns 16 or 32 rows of the weight. Its warps each own a stretch of K (split-K within the block: they
// add up at the end, in their order), and take it in turns of 2 or 4 words of 64 columns:
//
//   count   the bits of a turn say where each row's values stand
//   copy    those values, which are adjacent, to shared memory by 16 bytes: up to 8 KB a warp on the way,
//           100 KB a multiprocessor, where 0.7 us of latency at that rate ask for 18
//   decode  a lane's bits and values become its fragments of mma, the weight its a and x its b
//
// Where a warp's stretch begins in the values it learns from a first pass over the bits of the block.
//
// Any order of k will do for a sum, so fragments take the memory's: lane 4 g + t of a warp has bits and x of
// adjacent columns, in a window of 64 (a word of bits)
//   16-bit floats: 8 t .. 8 t + 7 of each half, which feed two products of 16 columns a half
//   int8:          16 t .. 16 t + 15, which feed two products of 32 columns
// of weight rows g and g + 8 and of tokens g, g + 8, ..
//
// mma multiplies pruned weights too, as zeros, and 0 * Inf is NaN. An Inf or NaN in x always shows: whatever
// meets it, the sum is no longer finite. A warp whose sums are not finite computes them again by plain fma of
// the kept weights alone, which is also how float32 goes.
#pragma once
#include "cuda/bitmap_walk.cuh"
#include "cuda/float_chunk.cuh"

namespace trimtab {
namespace {

template <class C>
using BitmapSums = typename C::Sum[C::kTiles][C::kTokens][4];

// --- decoding

// The kept values of eight columns as four pairs, zeros where none is kept.
TT_DEVICE void expand_pairs(const char* values, uint32_t bits, uint32_t (&pair)[4]) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(values);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t low = 0, high = 0;
    if (bits >> (2 * i) & 1) low = *from;
    from += bits >> (2 * i) & 1;
    if (bits >> (2 * i + 1) & 1) high = *from;
    from += bits >> (2 * i + 1) & 1;
    pair[i] = low | high << 16;
  }
}

// For each four bits the selector of __byte_perm that moves adjacent bytes to where bits are set and a zero
// elsewhere, and above it how many they are.
TT_DEVICE uint32_t expand_entry(uint32_t bits) {
  uint32_t selector = 0, kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    selector |= (bits >> i & 1 ? kept : 4u) << (4 * i);
    kept += bits >> i & 1;
  }
  return selector | kept << 16;
}

// The kept values of 16 columns, byte `at` of shared memory on, as four words.
TT_DEVICE void expand_bytes(const char* shared, int at, uint32_t bits, const uint32_t* table,
                            uint32_t (&word)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t entry = table[bits >> (4 * i) & 15];
    const uint32_t* two = reinterpret_cast<const uint32_t*>(shared + (at & ~3));
    const uint32_t four = uint32_t((uint64_t(two[1]) << 32 | two[0]) >> (at % 4 * 8));
    word[i] = __byte_perm(four, 0, entry);
    at += int(entry >> 16);
  }
}

// Bits of a window's word that are this lane's (first .. first + count - 1), and where their values begin
// among the row's in shared memory.
struct LaneBits {
  uint32_t bits;
  int at;
};
template <class C>
TT_DEVICE LaneBits lane_bits(const BitmapWarp<C>& warp, int row, int i, int first, int count) {
  const uint64_t word = warp.bits()[row * C::kWords + i];
  const uint32_t low = uint32_t(word), high = uint32_t(word >> 32);
  const uint32_t half = first < 32 ? low : high, shift = uint32_t(first) % 32;
  const int below = __popc(half & ((1u << shift) - 1)) + (first < 32 ? 0 : __popc(low));
  const int start = warp.start()[row * C::kWords + i];
  return {half >> shift & ((1u << count) - 1),
          row * C::kRowBytes + start + below * int(sizeof(typename C::T))};
}

template <class T>
TT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<T, bf16>::value) mma_bf16(d, a, b);
  else mma_fp16(d, a, b);
}

// The first of the block's 8 kTokens rows of x.
template <class C>
TT_DEVICE int first_token() {
  return int(blockIdx.y) * 8 * C::kTokens;
}

// Row m of the block's x; the last one of all for those beyond, whose sums no one stores.
template <class C>
TT_DEVICE const typename C::T* token_row(const BitmapParams& p, int m) {
  const int row = first_token<C>() + m;
  return static_cast<const typename C::T*>(p.x) +
         int64_t(row < p.epilogue.M ? row : p.epilogue.M - 1) * p.x_stride;
}

// Columns k .. k + 7 of a row of x; zeros from K on.
template <class T>
TT_DEVICE void load_token(const BitmapParams& p, const T* row, int k, RawChunk<T>& raw) {
  if (p.wide && k + kChunk <= p.K) load_whole_chunk(row + k, true, raw);
  else load_chunk<false>(row, k, p.K, raw);
}

// sums += a window of 16-bit floats.
template <class C>
TT_DEVICE void multiply(const BitmapParams& p, const BitmapWarp<C>& warp, int word, int i,
                        const uint32_t*, BitmapSums<C>& sums) {
  using T = typename C::T;
  const int g = warp.lane / 4, t = warp.lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RawChunk<T> x[C::kTokens];
    const int column = 32 * half + 8 * t;
#pragma unroll
    for (int j = 0; j < C::kTokens; ++j)
      load_token(p, token_row<C>(p, 8 * j + g), 64 * word + column, x[j]);
#pragma unroll
    for (int tile = 0; tile < C::kTiles; ++tile) {
      uint32_t upper[4], lower[4];
      const LaneBits first = lane_bits(warp, 16 * tile + g, i, column, 8);
      const LaneBits second = lane_bits(warp, 16 * tile + 8 + g, i, column, 8);
      expand_pairs(warp.shared + first.at, first.bits, upper);
      expand_pairs(warp.shared + second.at, second.bits, lower);
#pragma unroll
      for (int s = 0; s < 4; s += 2) {
        const uint32_t a[4] = {upper[s], lower[s], upper[s + 1], lower[s + 1]};
#pragma unroll
        for (int j = 0; j < C::kTokens; ++j) {
          const uint32_t b[2] = {x[j].part[0].word[s], x[j].part[0].word[s + 1]};
          mma<T>(sums[tile][j], a, b);
        }
      }
    }
  }
}

// sums += a window of int8.
template <class C>
TT_DEVICE void multiply_int8(const BitmapParams& p, const BitmapWarp<C>& warp, int word, int i,
                             const uint32_t* table, BitmapSums<C>& sums) {
  const int g = warp.lane / 4, t = warp.lane % 4, k = 64 * word + 16 * t;
  Bytes16 x[C::kTokens];
#pragma unroll
  for (int j = 0; j < C::kTokens; ++j) {
    x[j] = {};
    if (k < p.K)
      x[j] = load_global(reinterpret_cast<const Bytes16*>(token_row<C>(p, 8 * j + g) + k));
  }
#pragma unroll
  for (int tile = 0; tile < C::kTiles; ++tile) {
    uint32_t upper[4], lower[4];
    const LaneBits first = lane_bits(warp, 16 * tile + g, i, 16 * t, 16);
    const LaneBits second = lane_bits(warp, 16 * tile + 8 + g, i, 16 * t, 16);
    expand_bytes(warp.shared, first.at, first.bits, table, upper);
    expand_bytes(warp.shared, second.at, second.bits, table, lower);
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      const uint32_t a[4] = {upper[s], lower[s], upper[s + 1], lower[s + 1]};
#pragma unroll
      for (int j = 0; j < C::kTokens; ++j) {
        const uint32_t b[2] = {x[j].word[s], x[j].word[s + 1]};
        mma_s8(sums[tile][j], a, b);
      }
    }
  }
}

// --- plain sums

template <class T>
TT_DEVICE float shared_value(const char* from) {
  if constexpr (sizeof(T) == 4) return *reinterpret_cast<const float*>(from);
  else return to_float(T{*reinterpret_cast<const uint16_t*>(from)});
}

// Tokens whose sums a pass takes: float32 has its registers for them, the others come here rarely.
template <class T>
constexpr int kPassTokens = sizeof(T) == 4 ? 4 : 1;

// sum[half][m] += the kept weights of row g + 8 half of a tile times token first + m, over this lane's columns.
template <class C>
TT_DEVICE void add_kept(const BitmapParams& p, const BitmapWarp<C>& warp, int word, int i, int tile,
                        int first, float (&sum)[2][kPassTokens<typename C::T>]) {
  using T = typename C::T;
  const int g = warp.lane / 4, t = warp.lane % 4;
#pragma unroll 1
  for (int column = 8 * t; column < 64; column += 32) {
    float w[2][kChunk];
    uint32_t bits[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LaneBits mine = lane_bits(warp, 16 * tile + 8 * half + g, i, column, 8);
      const char* from = warp.shared + mine.at;
      bits[half] = mine.bits;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        w[half][k] = 0.0f;
        if (mine.bits >> k & 1) w[half][k] = shared_value<T>(from);
        from += int(mine.bits >> k & 1) * int(sizeof(T));
      }
    }
#pragma unroll
    for (int m = 0; m < kPassTokens<T>; ++m) {
      RawChunk<T> x;
      load_token(p, token_row<C>(p, first + m), 64 * word + column, x);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
          if (bits[half] >> k & 1)
            sum[half][m] = fma(F32x1(w[half][k]), F32x1(element(x, k)), F32x1(sum[half][m])).v;
    }
  }
}

// The sum of a quad of lanes, in all four.
TT_DEVICE float quad_sum(float x) {
  x = (F32x1(x) + F32x1(__shfl_xor_sync(~0u, x, 1))).v;
  return (F32x1(x) + F32x1(__shfl_xor_sync(~0u, x, 2))).v;
}

// The warp's sums by fma of the kept weights alone. One copy of the code for all passes: which sums they are
// is asked where they are known.
template <class C>
TT_DEVICE void sum_plain(const BitmapParams& p, const BitmapWarp<C>& warp, BitmapSums<C>& sums) {
  constexpr int kPass = kPassTokens<typename C::T>, kPasses = 8 * C::kTokens / kPass;
  const int t = warp.lane % 4;
#pragma unroll 1
  for (int pass = 0; pass < C::kTiles * kPasses; ++pass) {
    const int tile = pass / kPasses, first = pass % kPasses * kPass;
    if (first_token<C>() + first >= p.epilogue.M) continue;
    float sum[2][kPass] = {};
    walk(p, warp, [&](int word, int i) { add_kept(p, warp, word, i, tile, first, sum); });
#pragma unroll
    for (int i = 0; i < 2 * kPass; ++i) {
      const float all = quad_sum(sum[i / kPass][i % kPass]);
      const int m = first + i % kPass;
#pragma unroll
      for (int k = 0; k < C::kTiles * C::kTokens; ++k) {
        const bool mine = k == tile * C::kTokens + m / 8 && t == m % 8 / 2;
        float (&to)[4] = sums[k / C::kTokens][k % C::kTokens];
        const int half = i / kPass * 2;
        to[half] = mine && m % 2 == 0 ? all : to[half];
        to[half + 1] = mine && m % 2 == 1 ? all : to[half + 1];
      }
    }
  }
}

template <class C>
TT_DEVICE bool all_finite(const BitmapSums<C>& sums) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < C::kTiles * C::kTokens * 4; ++i)
    finite &= (float_bits(sums[i / 4 / C::kTokens][i / 4 % C::kTokens][i % 4]) & 0x7f800000u) !=
              0x7f800000u;
  return __all_sync(~0u, finite);
}

template <class C>
TT_DEVICE void sum_share(const BitmapParams& p, const BitmapWarp<C>& warp, const uint32_t* table,
                         BitmapSums<C>& sums) {
  if constexpr (sizeof(typename C::T) == 1) {
    walk(p, warp, [&](int word, int i) { multiply_int8(p, warp, word, i, table, sums); });
  } else {
    if constexpr (sizeof(typename C::T) == 2) {
      walk(p, warp, [&](int word, int i) { multiply(p, warp, word, i, table, sums); });
      if (all_finite<C>(sums)) return;
    }
    sum_plain(p, warp, sums);
  }
}

// --- the block

// Output i of the block: the warps' sums in their order, then the epilogue.
template <class C>
TT_DEVICE void finish(const BitmapParams& p, const char* shared, int warps, int i) {
  using Sum = typename C::Sum;
  const EpilogueParams& e = p.epilogue;
  const int token = i / C::kRows, row = i % C::kRows;
  const int m = first_token<C>() + token, n = int(blockIdx.x) * C::kRows + row;
  if (m >= e.M || n >= e.N) return;
  Sum total = 0;
  for (int w = 0; w < warps; ++w) {
    const Sum one =
        reinterpret_cast<const Sum*>(shared + w * C::kWarpBytes)[token * C::kPitch + row];
    if constexpr (sizeof(typename C::T) == 1) total = int32_t(uint32_t(total) + uint32_t(one));
    else total = (F32x1(total) + F32x1(one)).v;
  }
  const F32x1 bias(load_bias(e, n));
  float t[1];
  if constexpr (sizeof(typename C::T) == 1) {
    const F32x1 a_scale(load_global(e.a_scale + m)), b_scale(load_global(e.b_scale + n));
    t[0] = epilogue<Activation::none>(F32x1(static_cast<float>(total)), a_scale, b_scale, bias).v;
  } else {
    t[0] = (F32x1(total) + bias).v;
  }
  activate_all(e.activation, t);
  store_one(e, int64_t(m) * e.out_stride + n, 0.0f, t[0]);
}

// Grid: blocks of kRows weight rows, and of 8 kTokens rows of x. Block: at most kWarps warps.
template <class C>
__global__ void __launch_bounds__(32 * C::kWarps, C::kBlocks)
    bitmap_mm_kernel(const __grid_constant__ BitmapParams p) {
  char* shared = shared_memory();
  const int own = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  int* counts = reinterpret_cast<int*>(shared + warps * C::kWarpBytes);
  uint32_t* table = reinterpret_cast<uint32_t*>(counts + warps * C::kRows);
  if (threadIdx.x < 16) table[threadIdx.x] = expand_entry(threadIdx.x);
  BitmapWarp<C> warp = {};
  warp.shared = shared + own * C::kWarpBytes;
  warp.lane = int(threadIdx.x) % 32;
  warp.first_row = int(blockIdx.x) * C::kRows;
  warp.begin = own * p.share < p.words ? own * p.share : p.words;
  warp.end = warp.begin + p.share < p.words ? warp.begin + p.share : p.words;
  warp.position = first_position(p, warp, counts);
  BitmapSums<C> sums = {};
  sum_share(p, warp, table, sums);
  // The sums go where the values were: the warp's last product or exchange had all that was read there.
  const int g = warp.lane / 4, t = warp.lane % 4;
  typename C::Sum* to = reinterpret_cast<typename C::Sum*>(warp.shared);
#pragma unroll
  for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
    for (int j = 0; j < C::kTokens; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        to[(8 * j + 2 * t + r % 2) * C::kPitch + 16 * tile + g + r / 2 * 8] = sums[tile][j][r];
  __syncthreads();
  for (int i = int(threadIdx.x); i < C::kRows * 8 * C::kTokens; i += int(blockDim.x))
    finish<C>(p, shared, warps, i);
}

}  // namespace
}  // namespace trimtab
