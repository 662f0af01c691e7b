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
#include <trimtab/bitmap_linear.h>

#include <type_traits>

#include "cuda/float_chunk.cuh"
#include "cuda/int8_epilogue.cuh"

namespace trimtab {

struct BitmapParams {
  const void*
      x;  // [M, K], rows x_stride elements apart; for int8 values the codes, whole 16 bytes a row
  int64_t x_stride;
  const char* values;  // aligned to 16
  int64_t count;  // of values
  const uint64_t* bits;  // [N, words]
  const int64_t* row_start;  // [N + 1]
  int32_t K, words;  // words of a row: ceil(K / 64)
  int32_t share;  // words of a row that are a warp's: whole turns
  bool wide;  // rows of x are aligned to 16 bytes
  EpilogueParams epilogue;
};

// kTiles: tiles of 16 weight rows a block;  kTokens: tiles of 8 rows of x
template <class T_, int kTiles_, int kTokens_>
struct BitmapConfig {
  using T = T_;
  using Sum = typename std::conditional<sizeof(T) == 1, int32_t, float>::type;
  static constexpr int kTiles = kTiles_, kTokens = kTokens_, kRows = 16 * kTiles;
  static constexpr int kWarps = kTiles == 1 ? 8 : 16;  // at most
  static constexpr int kBlocks = kTiles == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;  // on a multiprocessor
  static constexpr int kWords = (sizeof(T) == 4 ? 2 : 4) / kTiles;  // of a row in a turn
  static constexpr int kLaneWords = kRows * kWords / 32;
  static constexpr int kRowLanes = kWords / kLaneWords;  // that load a row's bits
  // A row's values of a turn if all are kept, and what lies before them in their first 16 bytes. Rows begin
  // four banks apart.
  static constexpr int kRowBytes = kWords * 64 * int(sizeof(T)) + 16;
  static constexpr int kBitsAt = kRows * kRowBytes;  // uint64 [kRows][kWords]
  static constexpr int kStartAt = kBitsAt + kRows * kWords * 8;  // int32 [kRows][kWords]
  static constexpr int kFromAt = kStartAt + kRows * kWords * 4;  // int64 [kRows]
  static constexpr int kChunksAt = kFromAt + kRows * 8;  // int32 [kRows]
  static constexpr int kWarpBytes = kChunksAt + kRows * 4;
  // Then, for the block: int32 [warps][kRows] counts, and the table of expand_bytes.
  static constexpr int kWarpShared = kWarpBytes + kRows * 4, kTableBytes = 64;
  // 4 more: lanes (g, t) write word 2 t pitch + g, 32 different banks.
  static constexpr int kPitch = kRows + 4;

  static_assert(kRowBytes % 128 == 16 && kWarpBytes % 16 == 0, "see above");
  static_assert(kRowLanes >= 1 && 32 % kRowLanes == 0, "every lane loads words of one row");
  static_assert(8 * kTokens * kPitch * 4 <= kWarpBytes, "the sums fit where the values were");
};

namespace {

template <class C>
using BitmapSums = typename C::Sum[C::kTiles][C::kTokens][4];

// A warp's place: its shared memory, its rows, its words of each, and what is kept before them of the row
// whose bits this lane loads.
template <class C>
struct BitmapWarp {
  char* shared;
  int lane, first_row;
  int begin, end;
  int64_t position;

  TT_DEVICE int row() const { return lane / C::kRowLanes; }
  TT_DEVICE uint64_t* bits() const { return reinterpret_cast<uint64_t*>(shared + C::kBitsAt); }
  TT_DEVICE int* start() const { return reinterpret_cast<int*>(shared + C::kStartAt); }
  TT_DEVICE int64_t* from() const { return reinterpret_cast<int64_t*>(shared + C::kFromAt); }
  TT_DEVICE int* chunks() const { return reinterpret_cast<int*>(shared + C::kChunksAt); }
};

TT_DEVICE int popcount64(uint64_t bits) {
  return __popc(uint32_t(bits)) + __popc(uint32_t(bits >> 32));
}

// This lane's words of the turn that begins with `word`; zeros beyond the warp's share and the last row.
template <class C>
TT_DEVICE void load_bits(const BitmapParams& p, const BitmapWarp<C>& warp, int word,
                         uint64_t (&bits)[C::kLaneWords]) {
  const int64_t n = int64_t(warp.first_row) + warp.row();
  const int first = word + warp.lane % C::kRowLanes * C::kLaneWords;
#pragma unroll
  for (int i = 0; i < C::kLaneWords; ++i)
    bits[i] = n < p.epilogue.N && first + i < warp.end
                  ? load_global(p.bits + n * p.words + first + i)
                  : 0;
}

// The sum over the lanes of a row.
template <class C>
TT_DEVICE int row_sum(int mine) {
  if constexpr (C::kRowLanes == 2) mine += __shfl_xor_sync(~0u, mine, 1);
  static_assert(C::kRowLanes <= 2, "one exchange is enough");
  return mine;
}

// Where the warp's values begin, from what all warps of the block count. Never outside [0, count], whatever
// row_start says.
template <class C>
TT_DEVICE int64_t first_position(const BitmapParams& p, const BitmapWarp<C>& warp, int* counts) {
  int mine = 0;
#pragma unroll 2
  for (int word = warp.begin; word < warp.end; word += C::kWords) {
    uint64_t bits[C::kLaneWords];
    load_bits(p, warp, word, bits);
#pragma unroll
    for (int i = 0; i < C::kLaneWords; ++i) mine += popcount64(bits[i]);
  }
  const int own = int(threadIdx.x) / 32;
  counts[own * C::kRows + warp.row()] = row_sum<C>(mine);
  __syncthreads();
  const int64_t n = int64_t(warp.first_row) + warp.row();
  if (n >= p.epilogue.N) return 0;
  int64_t position = load_global(p.row_start + n);
  position = position < 0 ? 0 : position < p.count ? position : p.count;
#pragma unroll 1
  for (int i = 0; i < own; ++i) position += counts[i * C::kRows + warp.row()];
  return position;
}

// The turn's bits, where each row's values are in memory and each word's in shared memory; position moves on.
template <class C>
TT_DEVICE void plan_turn(const BitmapParams& p, BitmapWarp<C>& warp, int word) {
  constexpr int kSize = int(sizeof(typename C::T));
  uint64_t bits[C::kLaneWords];
  load_bits(p, warp, word, bits);
  int mine = 0;
#pragma unroll
  for (int i = 0; i < C::kLaneWords; ++i) mine += popcount64(bits[i]);
  const int all = row_sum<C>(mine);
  const bool last = warp.lane % C::kRowLanes == C::kRowLanes - 1;
  const int64_t byte = warp.position * kSize;
  const int shift = int(byte % 16),
            at = warp.row() * C::kWords + (C::kWords - C::kLaneWords) * last;
  int start = shift + (last ? all - mine : 0) * kSize;
#pragma unroll
  for (int i = 0; i < C::kLaneWords; ++i) {
    warp.bits()[at + i] = bits[i];
    warp.start()[at + i] = start;
    start += popcount64(bits[i]) * kSize;
  }
  if (last) {
    warp.from()[warp.row()] = byte - shift;
    warp.chunks()[warp.row()] = all == 0 ? 0 : (shift + all * kSize + 15) / 16;
  }
  warp.position += all;
}

// The turn's values to shared memory. Eight lanes a row: 128 adjacent bytes.
template <class C>
TT_DEVICE void copy_turn(const BitmapParams& p, const BitmapWarp<C>& warp) {
  const int64_t end = p.count * int64_t(sizeof(typename C::T));
#pragma unroll 1
  for (int row = warp.lane / 8; row < C::kRows; row += 4) {
    const int64_t from = warp.from()[row];
    const int chunks = warp.chunks()[row];
#pragma unroll 1
    for (int c = warp.lane % 8; c < chunks; c += 8) {
      const int64_t at = from + 16 * c, left = end - at;
      cp_async16(warp.shared + row * C::kRowBytes + 16 * c, p.values + (left > 0 ? at : 0),
                 left <= 0   ? 0
                 : left < 16 ? int(left)
                             : 16);
    }
  }
  cp_async_commit();
}

// For every window of the warp's share: visit(window's word, its index in the turn), its values in shared
// memory.
template <class C, class Visit>
TT_DEVICE void walk(const BitmapParams& p, BitmapWarp<C> warp, const Visit& visit) {
#pragma unroll 1
  for (int word = warp.begin; word < warp.end; word += C::kWords) {
    __syncwarp();  // the turn before is done with what these overwrite
    plan_turn(p, warp, word);
    __syncwarp();
    copy_turn(p, warp);
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < C::kWords && word + i < warp.end; ++i) visit(word + i, i);
  }
}

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
  __syncwarp();  // the values are read: the sums go there
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
