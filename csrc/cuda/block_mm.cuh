// block_linear's product by cp.async, ldmatrix and mma.
//
// A row of blocks is a dense product of its kept blocks, side by side, with the columns of x they stand for:
// a block computes bn outputs of BLOCK_M tokens,
//
//   step i: 128 bytes of the row's kept K: 1 to 8 blocks, rows of bn weights;
//           of each token the columns that meet them, gathered; in kStages stages as in int8_mm_sm80.cuh
//
// Tokens are mma's a and weights its b. What bounds it is x from L2: a tile of 128 tokens and 64 outputs takes
// 24 KB for 2 * 64 * 64 * 128 operations, 44 a byte: at 5.5 TB/s 240 of H100's 990 TFLOP/s, so 64 x 64 blocks
// of which a tenth is kept take about two fifths of the dense product's time, an eighth of its operations' share
// left aside. Smaller blocks read x more often.
//
// Where tiles are few, several blocks share a row of blocks (parts), each an equal number of its kept ones;
// block_finish adds their sums in order. The order of a sum is the same in every run.
//
// Nothing outside the operands is read, whatever crow and col hold.
#pragma once
#include <trimtab/block_linear.h>

#include <type_traits>

#include "cuda/int8_epilogue.cuh"
#include "cuda/tile_copy.cuh"

namespace trimtab {

struct BlockParams {
  const char* x;  // [M, K] of T, rows x_stride bytes apart, whole 16 bytes
  int64_t x_stride;
  const char* values;  // [blocks, bn, bk] of T, aligned to 16
  const int32_t* crow;  // [rows + 1]
  const int32_t* col;  // [blocks]
  int32_t blocks;
  int32_t row_bytes;  // of a block: 16, 32, 64 or 128
  int32_t x_bytes;  // of a row of x
  int32_t parts;
  void* partial;  // [parts][M][bn * rows] sums where parts > 1
  EpilogueParams epilogue;
};

// A block of bn x .. weights meets BLOCK_M tokens.
template <int kN, int kM, int kWarpsN_, int kWarpsM_>
struct BlockTile {
  static constexpr int BLOCK_N = kN, BLOCK_M = kM, kWarpsN = kWarpsN_, kWarpsM = kWarpsM_;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM, kStages = 3;
  static constexpr int WARP_N = kN / kWarpsN, WARP_M = kM / kWarpsM;
  static constexpr int kFragmentsN = WARP_N / 8, kFragmentsM = WARP_M / 16;
  static constexpr int kStepBytes = 128, kChunks = 8, kPassRows = kThreads / kChunks;
  static constexpr int kWeightsAt = kM * kStepBytes;
  static constexpr int kStageBytes = (kM + kN) * kStepBytes;
  // 4 more: an eighth of a warp writes two adjacent words of a row each, 8 rows 4 banks apart.
  static constexpr int kPitch = kN + 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kMinBlocks = kThreads == 128 && kM == 128 && kN == 64 ? 3 : 4;

  static_assert(WARP_N % 16 == 0 && WARP_M % 16 == 0, "whole fragments");
  static_assert(kM % kPassRows == 0 && kN % kPassRows == 0, "a thread copies whole rows' chunks");
  static_assert(kM * kPitch * 4 <= kSharedBytes, "the sums fit the stages");
};

namespace {

template <class T>
using BlockSum = typename std::conditional<sizeof(T) == 1, int32_t, float>::type;

template <class Tile, class T>
using BlockSums = BlockSum<T>[Tile::kFragmentsM][Tile::kFragmentsN][4];

TT_DEVICE void block_mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t) {
  mma_s8(d, a, b);
}
TT_DEVICE void block_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  mma_bf16(d, a, b);
}
TT_DEVICE void block_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  mma_fp16(d, a, b);
}

// The kept blocks first .. end - 1 of a row of blocks and a part; inside [0, blocks], whatever crow holds.
struct BlockRange {
  int first, end;
};
TT_DEVICE BlockRange block_range(const int32_t* crow, int blocks, int row, int part, int parts) {
  const auto inside = [&](int b) { return b < 0 ? 0 : b < blocks ? b : blocks; };
  const int begin = inside(load_global(crow + row)), end = inside(load_global(crow + row + 1));
  const int64_t count = end > begin ? end - begin : 0;
  return {begin + int(count * part / parts), begin + int(count * (part + 1) / parts)};
}

// A thread's share of a step: one 16-byte chunk of every kPassRows-th row of x and of the weights.
template <class Tile>
struct BlockCopy {
  const BlockParams& p;
  BlockRange range;
  int row, chunk;
  int block_a_chunk;  // its block within a step
  int offset;  // its byte within a row of the block
  int column;  // of the block that the next issue() copies, asked for one step ahead

  TT_DEVICE BlockCopy(const BlockParams& params, BlockRange blocks) : p(params), range(blocks) {
    row = int(threadIdx.x) / Tile::kChunks;
    chunk = int(threadIdx.x) % Tile::kChunks;
    block_a_chunk = 16 * chunk / p.row_bytes;
    offset = 16 * chunk % p.row_bytes;
    column = load_column(0);
  }

  TT_DEVICE int block(int step) const {
    return range.first + step * (Tile::kStepBytes / p.row_bytes) + block_a_chunk;
  }
  TT_DEVICE int load_column(int step) const {
    const int b = block(step);
    return b < range.end ? load_global(p.col + b) : -1;
  }

  // What lies beyond the range's blocks or the operands becomes zero.
  TT_DEVICE void issue(char* stage, int step) {
    const int64_t left =
        column < 0 ? 0 : int64_t(p.x_bytes) - (int64_t(column) * p.row_bytes + offset);
    const int bytes = left <= 0 ? 0 : left < 16 ? int(left) : 16;
    const int64_t first_m = int64_t(blockIdx.y) * Tile::BLOCK_M + row;
    const char* x =
        p.x + first_m * p.x_stride + (bytes > 0 ? int64_t(column) * p.row_bytes + offset : 0);
    char* to = stage + swizzled<Tile::kChunks>(row, chunk);
#pragma unroll
    for (int i = 0; i < Tile::BLOCK_M / Tile::kPassRows; ++i) {
      const bool inside = first_m + i * Tile::kPassRows < p.epilogue.M;
      cp_async16(to + i * Tile::kPassRows * Tile::kStepBytes,
                 inside ? x + i * Tile::kPassRows * p.x_stride : p.x, inside ? bytes : 0);
    }
    const int b = block(step);
    const char* weights =
        p.values + (int64_t(b < range.end ? b : 0) * Tile::BLOCK_N + row) * p.row_bytes + offset;
#pragma unroll
    for (int i = 0; i < Tile::BLOCK_N / Tile::kPassRows; ++i)
      cp_async16(to + Tile::kWeightsAt + i * Tile::kPassRows * Tile::kStepBytes,
                 b < range.end ? weights + i * Tile::kPassRows * p.row_bytes : p.values,
                 b < range.end ? 16 : 0);
    column = load_column(step + 1);
  }
};

// sums += a stage, 32 bytes of K at once.
template <class Tile, class T>
TT_DEVICE void multiply_stage(const char* stage, BlockSums<Tile, T>& sums) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int m = warp / Tile::kWarpsN * Tile::WARP_M, n = warp % Tile::kWarpsN * Tile::WARP_N;
#pragma unroll
  for (int k = 0; k < Tile::kStepBytes / 32; ++k) {
    uint32_t a[Tile::kFragmentsM][4], b[Tile::kFragmentsN / 2][4];
    // ldmatrix's matrices as in int8_mm_sm80.cuh.
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i)
      ldmatrix_x4(a[i], stage + swizzled<Tile::kChunks>(m + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN / 2; ++j)
      ldmatrix_x4(b[j], stage + Tile::kWeightsAt +
                            swizzled<Tile::kChunks>(n + 16 * j + lane / 16 * 8 + lane % 8,
                                                    2 * k + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        block_mma(sums[i][j], a[i], pair, T{});
      }
  }
}

template <class Tile, class T>
TT_DEVICE void sum_blocks(const BlockParams& p, char* shared, BlockSums<Tile, T>& sums) {
  constexpr int kStages = Tile::kStages;
  const BlockRange range = block_range(p.crow, p.blocks, int(blockIdx.x), int(blockIdx.z), p.parts);
  const int per_step = Tile::kStepBytes / p.row_bytes;
  const int steps = (range.end - range.first + per_step - 1) / per_step;
  BlockCopy<Tile> copy(p, range);
  // A group a step, empty past the last one, so that the waits below can count groups.
  const auto ask = [&](int step, int stage) {
    if (step < steps) copy.issue(shared + stage * Tile::kStageBytes, step);
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) ask(i, i);
  int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    // This step's group has landed; every warp is done with the stage before it, which may be overwritten.
    cp_async_wait<kStages - 2>();
    __syncthreads();
    ask(step + kStages - 1, free_stage);
    multiply_stage<Tile, T>(shared + stage * Tile::kStageBytes, sums);
    free_stage = stage;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  __syncthreads();  // the stages are free for the sums
}

// The tile's sums as [BLOCK_M][kPitch] in shared memory.
template <class Tile, class T>
TT_DEVICE void write_sums(const BlockSums<Tile, T>& sums, BlockSum<T>* words) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  words += (warp / Tile::kWarpsN * Tile::WARP_M + g) * Tile::kPitch +
           warp % Tile::kWarpsN * Tile::WARP_N + 2 * t;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        words[(16 * i + r / 2 * 8) * Tile::kPitch + 8 * j + r % 2] = sums[i][j][r];
}

// t = epilogue of eight sums of token m, columns n .. n + 7, to out.
template <class Sum>
TT_DEVICE void store_outputs(const EpilogueParams& e, int m, int n, const Sum (&sum)[kGroup]) {
  float t[kGroup];
  const float scale = e.a_scale == nullptr ? 1.0f : load_global(e.a_scale + m);
  finish_group(e, scale, load_columns(e, n, 1), sum, t);
  store_group(e, m, n, 0.0f, t);
}

// Grid: rows of blocks, tiles of tokens, parts.
template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    block_mm_kernel(const __grid_constant__ BlockParams p) {
  using Sum = BlockSum<T>;
  char* shared = shared_memory();
  BlockSums<Tile, T> sums = {};
  sum_blocks<Tile, T>(p, shared, sums);
  Sum* words = reinterpret_cast<Sum*>(shared);
  write_sums<Tile, T>(sums, words);
  __syncthreads();
  constexpr int kGroups = Tile::BLOCK_N / kGroup;
  const int64_t width = int64_t(gridDim.x) * Tile::BLOCK_N;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < Tile::BLOCK_M * kGroups; i += Tile::kThreads) {
    const int token = i / kGroups, column = i % kGroups * kGroup;
    const int64_t m = int64_t(blockIdx.y) * Tile::BLOCK_M + token;
    const int n = int(blockIdx.x) * Tile::BLOCK_N + column;
    if (m >= p.epilogue.M) return;
    const Sum* from = words + token * Tile::kPitch + column;
    if (p.parts > 1) {
      char* to = static_cast<char*>(p.partial) +
                 ((int64_t(blockIdx.z) * p.epilogue.M + m) * width + n) * int64_t(sizeof(Sum));
      store16(to, *reinterpret_cast<const Bytes16*>(from));
      store16(to + 16, *reinterpret_cast<const Bytes16*>(from + 4));
      continue;
    }
    Sum sum[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum[j] = from[j];
    store_outputs(p.epilogue, int(m), n, sum);
  }
}

// Adds the parts in their order, eight outputs a thread. Grid: groups of columns, tokens.
struct BlockFinishParams {
  const void* partial;  // [parts][M][width]
  int32_t parts, width;
  EpilogueParams epilogue;
};

template <class Sum>
__global__ void __launch_bounds__(128, 4)
    block_finish_kernel(const __grid_constant__ BlockFinishParams p) {
  const int n = (int(blockIdx.x) * 128 + int(threadIdx.x)) * kGroup, m = int(blockIdx.y);
  if (n >= p.epilogue.N) return;
  Sum sum[kGroup] = {};
#pragma unroll 1
  for (int part = 0; part < p.parts; ++part) {
    const Sum* from =
        static_cast<const Sum*>(p.partial) + (int64_t(part) * p.epilogue.M + m) * p.width + n;
    const Bytes16 two[2] = {load16(from), load16(from + 4)};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const uint32_t word = two[j / 4].word[j % 4];
      if constexpr (std::is_same<Sum, float>::value)
        sum[j] = (F32x1(sum[j]) + F32x1(float_from_bits(word))).v;
      else sum[j] = int32_t(uint32_t(sum[j]) + word);
    }
  }
  store_outputs(p.epilogue, m, n, sum);
}

}  // namespace
}  // namespace trimtab
