// block_linear's product by multiply-adds: blocks of any size, float32, x at any address.
//
// It serves what the tensor cores do not: they have no float32, and blocks thinner than a fragment leave them
// mostly idle. x is turned first, xt [K][tokens], so that a warp's lanes are tokens: 128, four adjacent ones a
// lane. A warp owns kRows outputs of a row of blocks and walks its kept blocks:
//
//   sum[row][token] += w[row][k] * xt[k][token]
//
// 16 bytes of weights of each row come from one address for all lanes. What bounds it is L1: a column of float32 is
// 512 bytes, 4 clocks, against 8 clocks of multiply-adds with 8 rows and 1 with one row (1 x 16 blocks). Blocks
// that run together share their tokens and walk K side by side, so most of x comes from L1.
//
// The order of a sum is that of the kept blocks, in parts as in block_mm.cuh.
#pragma once
#include "cuda/block_mm.cuh"
#include "cuda/float_chunk.cuh"

namespace trimtab {

struct BlockFmaParams {
  const char* xt;  // [K][tokens] of T; zeros for tokens from M on
  const char* values;  // [blocks, bn, bk] of T
  const int32_t* crow;
  const int32_t* col;
  int32_t blocks, bn, bk, K;
  int32_t tokens;  // a multiple of kFmaTokens
  bool wide;  // rows of a block are whole 16 bytes, aligned
  int32_t parts;
  void* partial;  // [parts][M][whole thread blocks' outputs] sums where parts > 1
  EpilogueParams epilogue;
};

constexpr int kFmaWarps = 8, kFmaTokens = 128;

template <int kRows>
constexpr int kFmaOutputs = kFmaWarps * kRows;
// Words between two tokens' sums: odd, so that lanes, four tokens apart, write to eight banks.
template <int kRows>
constexpr int kFmaPitch = kFmaOutputs<kRows> + 1;

namespace {

// An element's bits.
template <class T>
using BitsOf = typename std::conditional<
    sizeof(T) == 4, uint32_t,
    typename std::conditional<sizeof(T) == 2, uint16_t, uint8_t>::type>::type;

// --- x turned

struct BlockTurnParams {
  const void* x;  // [M, K], rows x_stride elements apart
  int64_t x_stride;
  void* xt;  // [K][tokens]
  int32_t M, K, tokens;
};

// Tiles of 32 x 32. Grid: those of a stretch of 32 columns one after the other.
template <class Bits>
__global__ void __launch_bounds__(256, 4)
    block_turn_kernel(const __grid_constant__ BlockTurnParams p) {
  Bits* tile = reinterpret_cast<Bits*>(shared_memory());  // [32][33]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, across = p.tokens / 32;
  const int m0 = int(blockIdx.x) % across * 32, k0 = int(blockIdx.x) / across * 32;
#pragma unroll
  for (int i = warp; i < 32; i += 8) {
    const int m = m0 + i, k = k0 + lane;
    const Bits* from = static_cast<const Bits*>(p.x) + m * p.x_stride + k;
    tile[i * 33 + lane] = m < p.M && k < p.K ? load_global(from) : Bits(0);
  }
  __syncthreads();
#pragma unroll
  for (int i = warp; i < 32; i += 8)
    if (k0 + i < p.K)
      store_global(static_cast<Bits*>(p.xt) + int64_t(k0 + i) * p.tokens + m0 + lane,
                   tile[lane * 33 + i]);
}

// --- operands of a lane

// Element j of 16 bytes.
template <class T>
TT_DEVICE BlockSum<T> element16(const Bytes16& raw, int j) {
  if constexpr (sizeof(T) == 1)
    return int32_t(static_cast<int8_t>(raw.word[j / 4] >> (8 * (j % 4))));
  else if constexpr (sizeof(T) == 4) return float_from_bits(raw.word[j]);
  else return element(RawChunk<T>{{raw}}, j);
}

// Four tokens of a column, in the first words.
template <class T>
TT_DEVICE Bytes16 load_tokens(const char* from) {
  Bytes16 four = {};
  if constexpr (sizeof(T) == 4) {
    four = load_global(reinterpret_cast<const Bytes16*>(from));
  } else if constexpr (sizeof(T) == 2) {
    const Bytes8 two = load_global(reinterpret_cast<const Bytes8*>(from));
    four.word[0] = two.word[0];
    four.word[1] = two.word[1];
  } else {
    four.word[0] = load_global(reinterpret_cast<const uint32_t*>(from));
  }
  return four;
}

// Weights k .. of a row of bk, as many as 16 bytes hold; zeros from bk on.
template <class T>
TT_DEVICE Bytes16 load_weights(const BlockFmaParams& p, const char* row, int k) {
  if (p.wide) return load16(row + int64_t(k) * int(sizeof(T)));
  using Bits = BitsOf<T>;
  Bytes16 raw = {};
#pragma unroll
  for (int j = 0; j < 16 / int(sizeof(T)); ++j)
    if (k + j < p.bk) {
      const uint32_t bits = load_global(reinterpret_cast<const Bits*>(row) + k + j);
      raw.word[j * sizeof(T) / 4] |= bits << (j * sizeof(T) % 4 * 8);
    }
  return raw;
}

TT_DEVICE uint32_t sum_word(float sum) { return float_bits(sum); }
TT_DEVICE uint32_t sum_word(int32_t sum) { return uint32_t(sum); }

TT_DEVICE void multiply_add(float& sum, float w, float x) {
  sum = fma(F32x1(w), F32x1(x), F32x1(sum)).v;
}
TT_DEVICE void multiply_add(int32_t& sum, int32_t w, int32_t x) { sum += w * x; }

// --- the product

// sum += a kept block's rows times four tokens; `row` is its first row's weights, `column` its first column's
// tokens, of which `count` exist.
template <class T, int kRows>
TT_DEVICE void add_block(const BlockFmaParams& p, const char* row, const char* column, int count,
                         BlockSum<T> (&sum)[kRows][4]) {
  constexpr int kSize = int(sizeof(T)), kEach = 16 / kSize;
  const int64_t row_bytes = int64_t(p.bk) * kSize, column_bytes = int64_t(p.tokens) * kSize;
#pragma unroll 1
  for (int k = 0; k < count; k += kEach) {
    Bytes16 w[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) w[r] = load_weights<T>(p, row + r * row_bytes, k);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (k + j >= count) continue;
      const Bytes16 x = load_tokens<T>(column + (k + j) * column_bytes);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int t = 0; t < 4; ++t)
          multiply_add(sum[r][t], element16<T>(w[r], j), element16<T>(x, t));
    }
  }
}

// sum = outputs n .. n + kRows - 1, which are of one row of blocks, of tokens m .. m + 3.
template <class T, int kRows>
TT_DEVICE void sum_outputs(const BlockFmaParams& p, int n, int64_t m,
                           BlockSum<T> (&sum)[kRows][4]) {
  constexpr int kSize = int(sizeof(T));
  const BlockRange range = block_range(p.crow, p.blocks, n / p.bn, int(blockIdx.z), p.parts);
  int column = range.first < range.end ? load_global(p.col + range.first) : -1;
#pragma unroll 1
  for (int b = range.first; b < range.end; ++b) {
    const int64_t k = int64_t(column) * p.bk, left = p.K - k;
    const bool inside = column >= 0 && left > 0;
    if (b + 1 < range.end) column = load_global(p.col + b + 1);  // one block ahead
    if (!inside) continue;
    const char* row = p.values + (int64_t(b) * p.bn + n % p.bn) * p.bk * kSize;
    add_block<T, kRows>(p, row, p.xt + (k * p.tokens + m) * kSize, left < p.bk ? int(left) : p.bk,
                        sum);
  }
}

// Grid: outputs of kFmaWarps warps, stretches of kFmaTokens tokens, parts.
template <class T, int kRows>
__global__ void __launch_bounds__(32 * kFmaWarps, 2)
    block_fma_kernel(const __grid_constant__ BlockFmaParams p) {
  using Sum = BlockSum<T>;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int first_n = int(blockIdx.x) * kFmaOutputs<kRows>;
  const int64_t first_m = int64_t(blockIdx.y) * kFmaTokens;
  Sum* words = reinterpret_cast<Sum*>(shared_memory());  // [kFmaTokens][kFmaPitch]
  Sum sum[kRows][4] = {};
  const int n = first_n + warp * kRows;
  if (n < p.epilogue.N) sum_outputs<T, kRows>(p, n, first_m + 4 * lane, sum);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int t = 0; t < 4; ++t)
      words[(4 * lane + t) * kFmaPitch<kRows> + warp * kRows + r] = sum[r][t];
  __syncthreads();
  const int64_t width = int64_t(gridDim.x) * kFmaOutputs<kRows>;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kFmaTokens * kRows; i += 32 * kFmaWarps) {
    const int token = i / kRows, column = i % kRows * kGroup;
    const int64_t m = first_m + token;
    if (m >= p.epilogue.M) return;
    Sum eight[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) eight[j] = words[token * kFmaPitch<kRows> + column + j];
    if (p.parts == 1) {
      store_outputs(p.epilogue, int(m), first_n + column, eight);
      continue;
    }
    const int64_t at = (int64_t(blockIdx.z) * p.epilogue.M + m) * width + first_n + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Bytes16 four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.word[j] = sum_word(eight[4 * half + j]);
      store16(static_cast<Sum*>(p.partial) + at + 4 * half, four);
    }
  }
}

}  // namespace
}  // namespace trimtab
