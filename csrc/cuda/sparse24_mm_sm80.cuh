// sparse24_linear's product by cp.async, ldmatrix and mma.sp, on every GPU from sm_80 on.
//
// mma.sp wants its sparse operand first, so the weight is mma's a and x its b: a block computes the outputs
// of BLOCK_N weight rows for BLOCK_M tokens, transposed, and the epilogue turns them.
//
//   step i: 128 bytes of each token's K and the 64 bytes of kept weights that meet them,
//           in kStages stages of shared memory as in int8_mm_sm80.cuh
//
// A step of 64 x 64 outputs a warp takes 32 mma.sp (1024 clocks of a quarter multiprocessor's tensor core at
// the dense rate, 512 at the sparse one) and 12 KiB of fragments (96 clocks of shared memory).
#pragma once
#include <trimtab/sparse24_linear.h>

#include <type_traits>

#include "cuda/int8_epilogue.cuh"
#include "cuda/tile_copy.cuh"

namespace trimtab {

struct Sparse24Params {
  const int8_t* x;  // [M, K] of T, rows x_stride bytes apart
  int64_t x_stride;
  const int8_t* values;  // [N, K4 / 2] of T, rows values_stride bytes apart
  int64_t values_stride;
  const uint32_t* metadata;  // see sparse24_linear.h
  int32_t x_bytes, values_bytes;  // of a row
  int32_t blocks64;  // metadata blocks a row of blocks: 64 columns each
  int32_t tiles_m, tiles_n;
  EpilogueParams epilogue;
};

// A tile configuration; kMinBlocks as in int8_mm_sm80.cuh.
template <int kN, int kM, int kWarpsN_, int kWarpsM_, int kStages_, int kMinBlocks_>
struct Sparse24Tile {
  static constexpr int BLOCK_N = kN, BLOCK_M = kM;
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_;
  static constexpr int kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int WARP_N = kN / kWarpsN, WARP_M = kM / kWarpsM;
  static constexpr int kFragmentsN = WARP_N / 16, kFragmentsM = WARP_M / 8;
  static constexpr int kXBytes = 128, kValueBytes = 64;  // of a row in a step
  static constexpr int kMetaRow =
      2 * 128;  // bytes of a step's metadata of 16 rows; 16-bit values use half
  static constexpr int kValuesAt = kM * kXBytes, kMetaAt = kValuesAt + kN * kValueBytes;
  static constexpr int kStageBytes = kMetaAt + kN / 16 * kMetaRow;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Outputs of kSlabTokens tokens on their way to the epilogue, a token's WARP_N side by side. 4 more: lanes
  // (g, t) write word 2 t pitch + g, and with pitch % 16 = 4 these are 32 different banks.
  static constexpr int kSlabTokens = WARP_M < 16 ? WARP_M : 16;
  static constexpr int kSlabPitch = WARP_N + 4;
  static constexpr int kSlabWords = kSlabTokens * kSlabPitch;

  static_assert(WARP_N % 16 == 0 && WARP_M % 8 == 0, "whole fragments");
  static_assert(kSlabWords * 4 * kWarpsN * kWarpsM <= kSharedBytes, "the slabs fit the stages");
  static_assert(kStages >= 3, "a stage computed on, one arriving, one being asked for");
};

namespace {

// What differs between int8 and the two 16-bit floats.
template <class T>
struct Sparse24Type {
  using Sum = float;
  static constexpr int kMetaBlocks = 1;  // of 64 columns, in a step
};
template <>
struct Sparse24Type<int8_t> {
  using Sum = int32_t;
  static constexpr int kMetaBlocks = 2;
};

// Half of a step, 32 bytes of kept weights: of a 16-bit step, half kHalf of the metadata's lanes.
template <class T, int kHalf>
TT_DEVICE void mma_sp(typename Sparse24Type<T>::Sum (&sum)[4], const uint32_t (&a)[4],
                      const uint32_t (&b)[4], uint32_t e) {
  if constexpr (sizeof(T) == 1) mma_sp_s8(sum, a, b, e);
  else if constexpr ((std::is_same<T, bf16>::value)) mma_sp_bf16<kHalf>(sum, a, b, e);
  else mma_sp_fp16<kHalf>(sum, a, b, e);
}

// The metadata of a step. Past the last rows and columns: those of the last, which are valid; what meets
// them is zero.
template <class Tile, class T>
TT_DEVICE void copy_metadata(const Sparse24Params& p, char* stage, int tile_n, int step) {
  constexpr int kBlocks = Sparse24Type<T>::kMetaBlocks, kRows16 = Tile::BLOCK_N / 16;
  const int last16 = (p.epilogue.N + 15) / 16 - 1;
#pragma unroll
  for (int i = int(threadIdx.x); i < kRows16 * kBlocks * 8; i += Tile::kThreads) {
    const int chunk = i % 8, block = i / 8 % kBlocks, row16 = i / 8 / kBlocks;
    const int from_row = tile_n * kRows16 + row16 < last16 ? tile_n * kRows16 + row16 : last16;
    const int wanted = step * kBlocks + block;
    const int from_block = wanted < p.blocks64 ? wanted : p.blocks64 - 1;
    const uint32_t* from = p.metadata + (int64_t(from_row) * p.blocks64 + from_block) * 32;
    cp_async16(stage + row16 * Tile::kMetaRow + block * 128 + chunk * 16, from + chunk * 4, 16);
  }
}

template <class Tile, class T>
using Sparse24Sums = typename Sparse24Type<T>::Sum[Tile::kFragmentsN][Tile::kFragmentsM][4];

// sums += half kHalf of the stage.
template <class Tile, class T, int kHalf>
TT_DEVICE void multiply_half(const char* stage, int warp_n, int warp_m,
                             Sparse24Sums<Tile, T>& sums) {
  const int lane = int(threadIdx.x) % 32;
  const char* meta = stage + Tile::kMetaAt + warp_n * Tile::kFragmentsN * Tile::kMetaRow +
                     (Sparse24Type<T>::kMetaBlocks == 2 ? kHalf * 128 : 0);
  uint32_t a[Tile::kFragmentsN][4], e[Tile::kFragmentsN];
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsN; ++i) {
    // Matrices of ldmatrix: rows 0-7 and 8-15 at the first chunk, then at the second.
    const int row = warp_n * Tile::WARP_N + i * 16 + lane % 16;
    ldmatrix_x4(a[i], stage + Tile::kValuesAt + swizzled<4>(row, 2 * kHalf + lane / 16));
    e[i] = *(reinterpret_cast<const uint32_t*>(meta + i * Tile::kMetaRow) + lane);
  }
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsM; ++j) {
    uint32_t b[4];  // eight tokens, four chunks
    const int row = warp_m * Tile::WARP_M + j * 8 + lane % 8;
    ldmatrix_x4(b, stage + swizzled<8>(row, 4 * kHalf + lane / 8));
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN; ++i) mma_sp<T, kHalf>(sums[i][j], a[i], b, e[i]);
  }
}

// sums = the tile's products.
template <class Tile, class T, bool kAligned>
TT_DEVICE void sum_tile(const Sparse24Params& p, int tile_n, int tile_m, char* shared,
                        Sparse24Sums<Tile, T>& sums) {
  constexpr int kStages = Tile::kStages;
  const int warp_n = int(threadIdx.x) / 32 % Tile::kWarpsN;
  const int warp_m = int(threadIdx.x) / 32 / Tile::kWarpsN;
  const TileCopy<CopiedRows<Tile::kThreads, 8>, Tile::BLOCK_M, kAligned> copy_x(
      p.x, p.x_stride, int64_t(tile_m) * Tile::BLOCK_M, p.epilogue.M);
  const TileCopy<CopiedRows<Tile::kThreads, 4>, Tile::BLOCK_N, true> copy_values(
      p.values, p.values_stride, int64_t(tile_n) * Tile::BLOCK_N, p.epilogue.N);
  const int steps = (p.x_bytes + Tile::kXBytes - 1) / Tile::kXBytes;

  // A group a step, empty past the last one, so that the waits below can count groups.
  const auto ask = [&](int step, int stage) {
    if (step < steps) {
      char* into = shared + stage * Tile::kStageBytes;
      copy_x.issue(into, step * Tile::kXBytes, p.x_bytes);
      copy_values.issue(into + Tile::kValuesAt, step * Tile::kValueBytes, p.values_bytes);
      copy_metadata<Tile, T>(p, into + Tile::kMetaAt, tile_n, step);
    }
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
    const char* now = shared + stage * Tile::kStageBytes;
    multiply_half<Tile, T, 0>(now, warp_n, warp_m, sums);
    multiply_half<Tile, T, 1>(now, warp_n, warp_m, sums);
    free_stage = stage;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  __syncthreads();  // the stages are free for the sums
}

// Tokens slab * kSlabTokens .. of the warp's sums, turned: a token's outputs side by side.
template <class Tile, class Sum>
TT_DEVICE void write_token_slab(const Sum (&sums)[Tile::kFragmentsN][Tile::kFragmentsM][4],
                                int slab, Sum* words) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsM; ++j) {
    if (j * 8 / Tile::kSlabTokens != slab) continue;
    Sum* token = words + (j * 8 % Tile::kSlabTokens + 2 * t) * Tile::kSlabPitch + g;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN; ++i) {
      token[16 * i] = sums[i][j][0];
      token[Tile::kSlabPitch + 16 * i] = sums[i][j][1];
      token[16 * i + 8] = sums[i][j][2];
      token[Tile::kSlabPitch + 16 * i + 8] = sums[i][j][3];
    }
  }
}

// The warp's outputs from its sums; lanes as in int8_mm_sm80.cuh.
template <class Tile, class Sum>
TT_DEVICE void store_tokens(const EpilogueParams& e, int64_t first_m, int64_t first_n, char* shared,
                            const Sum (&sums)[Tile::kFragmentsN][Tile::kFragmentsM][4]) {
  constexpr int kLanes = Tile::WARP_N / kGroup, kTokensAtOnce = 32 / kLanes;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Sum* words = reinterpret_cast<Sum*>(shared) + warp * Tile::kSlabWords;
  const int step = e.wide ? 1 : kLanes;
  const int column = lane % kLanes * (e.wide ? kGroup : 1);
  const int64_t n = first_n + column;
  if (first_n >= e.N) return;  // the whole warp
  const ColumnGroup columns = load_columns(e, int(n), step);
  const float inverse = load_inverse(e);
#pragma unroll 1
  for (int slab = 0; slab < Tile::WARP_M / Tile::kSlabTokens; ++slab) {
    const int64_t first = first_m + slab * Tile::kSlabTokens;
    if (first >= e.M) return;
    __syncwarp();
    write_token_slab<Tile>(sums, slab, words);
    __syncwarp();
#pragma unroll 1
    for (int token = lane / kLanes; token < Tile::kSlabTokens && first + token < e.M;
         token += kTokensAtOnce) {
      Sum sum[kGroup];
      float t[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum[j] = words[token * Tile::kSlabPitch + column + j * step];
      const float scale = e.a_scale == nullptr ? 1.0f : load_global(e.a_scale + first + token);
      finish_group(e, scale, columns, sum, t);
      if (step == 1) store_group(e, int(first + token), int(n), inverse, t);
      else store_each(e, int(first + token), int(n), step, inverse, t);
    }
  }
}

// Grid: tiles, those of eight rows of tiles one below the other first, so that blocks that run together share
// their operands in L2.
template <class Tile, class T, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    sparse24_mm_sm80(const __grid_constant__ Sparse24Params p) {
  constexpr int kGroupM = 8;
  char* shared = shared_memory();
  const int tile = int(blockIdx.x), group_tiles = kGroupM * p.tiles_n;
  const int first = tile / group_tiles * kGroupM, within = tile % group_tiles;
  const int rows = p.tiles_m - first < kGroupM ? p.tiles_m - first : kGroupM;
  const int tile_m = first + within % rows, tile_n = within / rows;
  Sparse24Sums<Tile, T> sums = {};
  sum_tile<Tile, T, kAligned>(p, tile_n, tile_m, shared, sums);
  const int warp_n = int(threadIdx.x) / 32 % Tile::kWarpsN;
  const int warp_m = int(threadIdx.x) / 32 / Tile::kWarpsN;
  store_tokens<Tile>(p.epilogue, int64_t(tile_m) * Tile::BLOCK_M + warp_m * Tile::WARP_M,
                     int64_t(tile_n) * Tile::BLOCK_N + warp_n * Tile::WARP_N, shared, sums);
}

}  // namespace
}  // namespace trimtab
