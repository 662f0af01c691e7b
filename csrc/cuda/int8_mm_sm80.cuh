// int8_mm by cp.async, ldmatrix and mma.sync: any shape, stride and alignment, on every GPU from sm_80 on.
//
// A block computes BLOCK_M x BLOCK_N outputs, or one of `splits` slices of K of them. Tiles of a and b go
// through kStages stages of shared memory:
//
//   step i:  mma on stage i % kStages, fragments of the next 32 bytes of K loaded meanwhile
//            cp.async of step i + kStages - 1 into the stage that step i - 1 has left
//            at its end: wait for step i + 1, barrier
//
// What feeds the tensor cores (A100: 2048 multiply-adds a clock and multiprocessor):
//   from L2, 128 x 256 tiles ask for 24 bytes a clock, 128 x 128 for 32; it delivers about 47
//   from shared memory, warps of 64 x 64 ask for 64 bytes a clock of 128
#pragma once
#include "cuda/int8_epilogue.cuh"
#include "cuda/tile_copy.cuh"

namespace trimtab {

struct Int8MmSm80Params {
  const int8_t* a;  // [M, K], rows a_stride bytes apart
  int64_t a_stride;
  const int8_t* b;  // [N, K], rows b_stride bytes apart
  int64_t b_stride;
  int32_t K;
  int32_t tiles_m, tiles_n;
  int32_t steps_a_split;  // steps of BLOCK_K that a block takes
  int32_t splits;
  uint32_t* counters;  // a tile one, 0 at the start; unused with one split
  int32_t* parts;  // [tile][split][mma of a warp][thread][4]
  EpilogueParams epilogue;
};

// A tile configuration. kMinBlocks: blocks a multiprocessor must be able to hold, which caps the registers.
template <int kM, int kN, int kK, int kWarpsM_, int kWarpsN_, int kStages_, int kMinBlocks_>
struct Sm80Tile {
  static constexpr int BLOCK_M = kM, BLOCK_N = kN, BLOCK_K = kK;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kUnalignedBlocks = kMinBlocks - 1;  // its loads pass through registers
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int WARP_M = kM / kWarpsM, WARP_N = kN / kWarpsN;
  static constexpr int kFragmentsM = WARP_M / 16, kFragmentsN = WARP_N / 8;
  static constexpr int kChunks = kK / 16;  // 16-byte chunks of a row
  using Rows = CopiedRows<kThreads, kChunks>;
  static constexpr int kStageBytes = (kM + kN) * kK;
  // Sums on their way to the epilogue: up to 32 rows of a warp at once. 8 more a row: lanes (g, t) write 8
  // bytes at word (g pitch + 2 t), and with pitch % 32 = 8 four rows of them are 32 different banks.
  static constexpr int kSlabRows = WARP_M < 32 ? WARP_M : 32;
  static constexpr int kSlabs = WARP_M / kSlabRows;
  static constexpr int kSlabPitch = WARP_N + 8;
  static constexpr int kSlabWords = kSlabRows * kSlabPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  static_assert(kK == 64 || kK == 128, "the swizzles below");
  static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0,
                "whole ldmatrix_x4 of a and b, banks of the slab");
  static_assert(kSlabWords * 4 * kWarpsM * kWarpsN <= kSharedBytes, "the slabs fit the stages");
  static_assert(kStages >= 3, "a stage computed on, one arriving, one being asked for");
};

namespace {

// Tiles in groups of eight rows of tiles, down then right: the blocks that run together share their
// operands in L2.
TT_DEVICE void tile_of_block(const Int8MmSm80Params& p, int* tile_m, int* tile_n) {
  constexpr int kGroupM = 8;
  const int tile = int(blockIdx.x), group_tiles = kGroupM * p.tiles_n;
  const int first = tile / group_tiles * kGroupM, within = tile % group_tiles;
  const int rows = p.tiles_m - first < kGroupM ? p.tiles_m - first : kGroupM;
  *tile_m = first + within % rows;
  *tile_n = within / rows;
}

template <class Tile>
using Sm80Sums = int32_t[Tile::kFragmentsM][Tile::kFragmentsN][4];

// Fragments of 32 bytes of K: a[i] as mma takes it, b[i] for two mma beside each other.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kFragmentsM][4];
  uint32_t b[Tile::kFragmentsN / 2][4];

  // ldmatrix's matrices: of a, rows 0-7 and 8-15 at the first chunk, then at the second; of b, rows 0-7 at both
  // chunks, then rows 8-15. Rows 16 apart share their swizzle.
  TT_DEVICE void load(const char* stage, int warp_m, int warp_n, int k32) {
    const int lane = int(threadIdx.x) % 32;
    const char* a_row =
        stage + swizzled<Tile::kChunks>(warp_m * Tile::WARP_M + lane % 16, 2 * k32 + lane / 16);
    const char* b_row = stage + Tile::BLOCK_M * Tile::BLOCK_K +
                        swizzled<Tile::kChunks>(warp_n * Tile::WARP_N + lane / 16 * 8 + lane % 8,
                                                2 * k32 + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) ldmatrix_x4(a[i], a_row + i * 16 * Tile::BLOCK_K);
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN / 2; ++i)
      ldmatrix_x4(b[i], b_row + i * 16 * Tile::BLOCK_K);
  }

  TT_DEVICE void multiply(Sm80Sums<Tile>& sums) const {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_s8(sums[i][j], a[i], pair);
      }
    }
  }
};

// sums += the block's slice of K.
template <class Tile, bool kAligned>
TT_DEVICE void sum_slice(const Int8MmSm80Params& p, int tile_m, int tile_n, char* shared,
                         Sm80Sums<Tile>& sums) {
  constexpr int kStages = Tile::kStages, kSteps32 = Tile::BLOCK_K / 32;
  const int warp_m = int(threadIdx.x) / 32 % Tile::kWarpsM;
  const int warp_n = int(threadIdx.x) / 32 / Tile::kWarpsM;
  const TileCopy<typename Tile::Rows, Tile::BLOCK_M, kAligned> copy_a(
      p.a, p.a_stride, int64_t(tile_m) * Tile::BLOCK_M, p.epilogue.M);
  const TileCopy<typename Tile::Rows, Tile::BLOCK_N, kAligned> copy_b(
      p.b, p.b_stride, int64_t(tile_n) * Tile::BLOCK_N, p.epilogue.N);
  const int first_k = int(blockIdx.y) * p.steps_a_split * Tile::BLOCK_K;
  const int left = (p.K - first_k + Tile::BLOCK_K - 1) / Tile::BLOCK_K;
  const int steps = left < p.steps_a_split ? left : p.steps_a_split;
  if (steps <= 0) return;  // K = 0

  // A group a step, empty past the last one, so that the waits below can count groups.
  const auto ask = [&](int step, int stage) {
    if (step < steps) {
      char* into = shared + stage * Tile::kStageBytes;
      copy_a.issue(into, first_k + step * Tile::BLOCK_K, p.K);
      copy_b.issue(into + Tile::BLOCK_M * Tile::BLOCK_K, first_k + step * Tile::BLOCK_K, p.K);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) ask(i, i);
  cp_async_wait<kStages - 2>();
  __syncthreads();

  Fragments<Tile> fragments[2];
  fragments[0].load(shared, warp_m, warp_n, 0);
  int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int k32 = 0; k32 < kSteps32; ++k32) {
      if (k32 == kSteps32 - 1) {
        // Every warp holds its last fragments of this stage; after the barrier it may be overwritten.
        cp_async_wait<kStages - 2>();
        __syncthreads();
        free_stage = stage;
        stage = stage + 1 < kStages ? stage + 1 : 0;
        if (step + 1 < steps)
          fragments[0].load(shared + stage * Tile::kStageBytes, warp_m, warp_n, 0);
      } else {
        fragments[(k32 + 1) % 2].load(shared + stage * Tile::kStageBytes, warp_m, warp_n, k32 + 1);
      }
      if (k32 == 0) ask(step + kStages - 1, free_stage);
      fragments[k32 % 2].multiply(sums);
    }
  }
  // No copy is on its way, and the last barrier came after the last read: the stages are free for the sums.
}

// Leaves this slice's sums for the tile's last block; there, adds those of the others and returns true.
template <class Tile>
TT_DEVICE bool sum_splits(const Int8MmSm80Params& p, char* shared, Sm80Sums<Tile>& sums) {
  constexpr int kMmas = Tile::kFragmentsM * Tile::kFragmentsN;
  constexpr int64_t kPart = int64_t(kMmas) * Tile::kThreads;
  Bytes16* parts =
      reinterpret_cast<Bytes16*>(p.parts) + blockIdx.x * (p.splits * kPart) + threadIdx.x;
  Bytes16* mine = parts + blockIdx.y * kPart;
#pragma unroll
  for (int i = 0; i < kMmas; ++i) {
    const int32_t (&from)[4] = sums[i / Tile::kFragmentsN][i % Tile::kFragmentsN];
    Bytes16 sum;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.word[j] = uint32_t(from[j]);
    store16(mine + i * Tile::kThreads, sum);
  }
  // The parts before the count, the count before the others' parts.
  __threadfence();
  __syncthreads();
  uint32_t* arrived = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x == 0) *arrived = atomicAdd(p.counters + blockIdx.x, 1u);
  __syncthreads();
  const bool last = *arrived == uint32_t(p.splits - 1);
  __syncthreads();  // the slabs may overwrite it
  if (!last) return false;
  __threadfence();
#pragma unroll 1
  for (int split = 0; split < p.splits; ++split) {
    if (split == int(blockIdx.y)) continue;
    const Bytes16* theirs = parts + split * kPart;
#pragma unroll
    for (int i = 0; i < kMmas; ++i) {
      int32_t (&into)[4] = sums[i / Tile::kFragmentsN][i % Tile::kFragmentsN];
      const Bytes16 sum = load_global(theirs + i * Tile::kThreads);
#pragma unroll
      for (int j = 0; j < 4; ++j) into[j] = int32_t(uint32_t(into[j]) + sum.word[j]);
    }
  }
  return true;
}

struct alignas(8) SumPair {
  int32_t sum[2];
};

// Rows slab * kSlabRows .. of the warp's sums to its slab.
template <class Tile>
TT_DEVICE void write_slab(const Sm80Sums<Tile>& sums, int slab, int32_t* words) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
    if (i * 16 / Tile::kSlabRows != slab) continue;
    int32_t* row = words + (i * 16 % Tile::kSlabRows + g) * Tile::kSlabPitch + 2 * t;
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const int32_t (&sum)[4] = sums[i][j];
      SumPair* upper = reinterpret_cast<SumPair*>(row + 8 * j);
      SumPair* lower = reinterpret_cast<SumPair*>(row + 8 * Tile::kSlabPitch + 8 * j);
      *upper = SumPair{{sum[0], sum[1]}};
      *lower = SumPair{{sum[2], sum[3]}};
    }
  }
}

// Eight sums of a lane, `step` columns apart.
TT_DEVICE void read_slab(const int32_t* words, int step, int32_t (&sum)[kGroup]) {
  if (step == 1) {
    const Bytes16 low = *reinterpret_cast<const Bytes16*>(words);
    const Bytes16 high = *reinterpret_cast<const Bytes16*>(words + 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] = int32_t(low.word[j]);
      sum[j + 4] = int32_t(high.word[j]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) sum[j] = words[j * step];
}

// The warp's outputs from its sums. Each lane keeps eight columns and walks down the rows: adjacent ones where
// out takes 16-byte stores, else every kLanes-th, so that the lanes' stores still lie side by side.
template <class Tile>
TT_DEVICE void store_tile(const EpilogueParams& e, int64_t tile_row, int64_t tile_column,
                          char* shared, const Sm80Sums<Tile>& sums) {
  constexpr int kLanes = Tile::WARP_N / kGroup, kRowsAtOnce = 32 / kLanes;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int32_t* words = reinterpret_cast<int32_t*>(shared) + warp * Tile::kSlabWords;
  const int step = e.wide ? 1 : kLanes;
  const int column = lane % kLanes * (e.wide ? kGroup : 1);
  const int64_t n = tile_column + warp / Tile::kWarpsM * Tile::WARP_N + column;
  if (n - column >= e.N) return;  // the whole warp
  const ColumnGroup columns = load_columns(e, int(n), step);
  const float inverse = load_inverse(e);
#pragma unroll 1
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    const int64_t first = tile_row + warp % Tile::kWarpsM * Tile::WARP_M + slab * Tile::kSlabRows;
    if (first >= e.M) return;
    __syncwarp();
    write_slab<Tile>(sums, slab, words);
    __syncwarp();
#pragma unroll 1
    for (int row = lane / kLanes; row < Tile::kSlabRows && first + row < e.M; row += kRowsAtOnce) {
      int32_t sum[kGroup];
      float t[kGroup];
      read_slab(words + row * Tile::kSlabPitch + column, step, sum);
      finish_group(e, load_global(e.a_scale + first + row), columns, sum, t);
      if (step == 1) store_group(e, int(first + row), int(n), inverse, t);
      else store_each(e, int(first + row), int(n), step, inverse, t);
    }
  }
}

// Grid: (tiles, splits). A tile's registers and shared memory are those of its row in int8_mm.cu.
template <class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads,
                                  kAligned ? Tile::kMinBlocks : Tile::kUnalignedBlocks)
    int8_mm_sm80(const __grid_constant__ Int8MmSm80Params p) {
  char* shared = shared_memory();
  int tile_m, tile_n;
  tile_of_block(p, &tile_m, &tile_n);
  Sm80Sums<Tile> sums = {};
  sum_slice<Tile, kAligned>(p, tile_m, tile_n, shared, sums);
  if (p.splits > 1 && !sum_splits<Tile>(p, shared, sums)) return;
  store_tile<Tile>(p.epilogue, int64_t(tile_m) * Tile::BLOCK_M, int64_t(tile_n) * Tile::BLOCK_N,
                   shared, sums);
}

}  // namespace
}  // namespace trimtab
