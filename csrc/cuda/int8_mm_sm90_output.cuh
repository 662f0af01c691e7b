// The shared memory of int8_mm_sm90.cuh, its ring of stages, and the way from a tile's sums to its outputs.
#pragma once
#include "cuda/int8_epilogue.cuh"
#include "cuda/int8_mm_sm90_tiles.cuh"
#include "cuda/ptx_sm90.cuh"
#include "math/dtypes.h"

namespace trimtab {

struct Int8MmSm90Params {
  CUtensorMap tall, wide;
  EpilogueParams epilogue;
  int32_t units, tall_units, wide_units;  // units = tall_units * wide_units
  int32_t group;  // tall units of a group (sm90_group)
  int32_t steps;  // of 128 bytes of K
  int32_t cluster;
};

namespace {

constexpr int kSm90Warpgroups = 2;
constexpr int kSm90Warps = 4 * kSm90Warpgroups;
constexpr int kSm90Threads = 128 * (kSm90Warpgroups + 1);
constexpr int kSm90SharedBytes = 227 * 1024;

// A stage of the ring and how often it has come round, as parity.
template <int kStages>
struct Sm90Ring {
  int stage = 0;
  uint32_t parity = 0;
  TT_DEVICE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The sums of a warp's 16 tall rows and 8 of the wide ones, as sm90_slot places them.
struct Sm90Piece {
  uint32_t word[128];
};

// The kernel's parameters, and what a block of it has in shared memory.
//   kWide_     rows of the wide operand in a tile: the n of wgmma
//   kSwapped_  tall is b and wide is a
//   kSplit_    the blocks of a cluster share out K; else they share the wide operand
template <int kWide_, bool kSwapped_, bool kSplit_>
struct Sm90Shared {
  static constexpr int kWide = kWide_;
  static constexpr bool kSwapped = kSwapped_, kSplit = kSplit_;
  static constexpr int kBlockM = kSwapped ? kWide : kSm90Tall;
  static constexpr int kBlockN = kSwapped ? kSm90Tall : kWide;
  // Sums lie in shared memory at once: all of a split tile, else 32 columns to leave room for stages.
  static constexpr int kPieces = kSplit ? kWide / 8 : 4;  // a warp
  static constexpr int kStageBytes = (kSm90Tall + kWide) * kSm90Depth;
  static constexpr int kOtherBytes = kSm90Warps * kPieces * int(sizeof(Sm90Piece)) +
                                     kSm90Warpgroups * (kBlockM + 2 * kBlockN) * 4 + 512;
  // wide 256: 4; 192: 5; 128: 6, or 4 with kSplit; 64: 7; 32: 10
  static constexpr int kStages = (kSm90SharedBytes - kOtherBytes) / kStageBytes;

  int8_t tall[kStages][kSm90Tall * kSm90Depth];
  int8_t wide[kStages][kWide * kSm90Depth];
  Sm90Piece sums[kSm90Warps][kPieces];
  struct alignas(16) Factors {
    float b_scale[kBlockN], bias[kBlockN], a_scale[kBlockM];
    float inverse;  // 1 / out_scale, for int8 out
  } factors[kSm90Warpgroups];
  // A stage's turn: full when both boxes came; empty when every warp that reads it, in all blocks that it was
  // loaded for, is done with it.
  uint64_t full[kStages], empty[kStages];
  // Split K: all sums of a tile written; all of them read.
  uint64_t written, read;
};

// --- the factors of a tile, asked for before its products and stored after them

// As it lies in memory, to be widened when it has come.
TT_DEVICE uint32_t sm90_bias_bits(const EpilogueParams& e, int n) {
  if (e.bias == nullptr) return 0;
  if (e.bias_dtype == TT_F32) return load_global(static_cast<const uint32_t*>(e.bias) + n);
  return load_global(static_cast<const uint16_t*>(e.bias) + n);
}

TT_DEVICE float sm90_bias(const EpilogueParams& e, uint32_t bits) {
  if (e.bias == nullptr) return -0.0f;  // t + -0.0 is t, for -0.0 too
  if (e.bias_dtype == TT_F32) return float_from_bits(bits);
  const uint16_t half = static_cast<uint16_t>(bits);
  return e.bias_dtype == TT_BF16 ? to_float(bf16{half}) : to_float(fp16{half});
}

template <int kBlockM, int kBlockN>
struct Sm90FactorRegisters {
  static constexpr int kColumns = (kBlockN + 127) / 128, kRows = (kBlockM + 127) / 128;
  float b_scale[kColumns], a_scale[kRows], out_scale;
  uint32_t bias[kColumns];

  // Thread t of the warpgroup: columns and rows t, t + 128, .. of the tile at (m, n).
  TT_DEVICE void load(const EpilogueParams& e, int m, int n, int t) {
    out_scale = t == 0 && e.out_scale != nullptr ? load_global(e.out_scale) : 1.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int at = i * 128 + t;
      const bool inside = at < kBlockN && n + at < e.N;
      b_scale[i] = inside ? load_global(e.b_scale + n + at) : 0.0f;
      bias[i] = inside ? sm90_bias_bits(e, n + at) : 0;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int at = i * 128 + t;
      const bool inside = at < kBlockM && m + at < e.M;
      a_scale[i] = inside ? load_global(e.a_scale + m + at) : 0.0f;
    }
  }

  template <class Factors>
  TT_DEVICE void store(const EpilogueParams& e, Factors& to, int t) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i * 128 + t >= kBlockN) continue;
      to.b_scale[i * 128 + t] = b_scale[i];
      to.bias[i * 128 + t] = sm90_bias(e, bias[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i * 128 + t < kBlockM) to.a_scale[i * 128 + t] = a_scale[i];
    if (t == 0) to.inverse = (F32x1(1.0f) / F32x1(out_scale)).v;
  }
};

// --- sums to outputs
//
// Lane 4 g + t of a warp has four sums for each eight wide rows: (tall g, wide 2 t), (g, 2 t + 1),
// (g + 8, 2 t), (g + 8, 2 t + 1). They are written as 16 bytes, and read as eight that are adjacent along N.
// The places of the lanes are permuted so that neither is a bank conflict:
//   16 lanes read two wide neighbours, for one t, of g = 0 .. 7 and both halves: hence t ^ g / 2
//   32 lanes read one tall row (swapped), for one g, of all t, both halves and two pieces: hence g ^ 1 in
//   every other piece

// The first word of lane 4 g + t's four in piece i.
template <bool kSwapped>
TT_DEVICE int sm90_slot(int g, int t, int i) {
  return 4 * (4 * (kSwapped ? g ^ i % 2 : g) + (t ^ g / 2));
}

// The word of the sum at (tall row, wide row) of piece i.
template <bool kSwapped>
TT_DEVICE int sm90_word(int tall, int wide, int i) {
  return sm90_slot<kSwapped>(tall % 8, wide / 2, i) + 2 * (tall / 8) + wide % 2;
}

template <bool kSwapped, int kPieces, int kSums>
TT_DEVICE void sm90_write(Sm90Piece (&pieces)[kPieces], const int32_t (&d)[kSums], int first,
                          int lane) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    Bytes16 four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.word[j] = uint32_t(d[first + 4 * i + j]);
    const int slot = sm90_slot<kSwapped>(lane / 4, lane % 4, i);
    *reinterpret_cast<Bytes16*>(&pieces[i].word[slot]) = four;
  }
}

// Which eight sums a lane finishes: rows of a piece, the first of them.
struct Sm90Eight {
  int piece, tall, wide;  // piece: of the warp's; tall 0 .. 15, wide 0 .. 7
};

// 32 lanes finish the sums of two pieces: 16 values along N are 32 bytes of bf16, a sector.
template <bool kSwapped>
TT_DEVICE Sm90Eight sm90_eight(int pass, int lane) {
  if (kSwapped) return {2 * pass + lane / 16, lane / 8 % 2 * 8, lane % 8};
  return {2 * pass + lane / 16, lane % 16, 0};
}

// The sums of a lane's eight outputs; with kSplit the sums over the cluster's blocks.
template <bool kSwapped, bool kSplit>
TT_DEVICE void sm90_read(const Sm90Piece& piece, const Sm90Eight& at, int blocks,
                         int32_t (&sum)[kGroup]) {
  const uint32_t* word[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const int tall = at.tall + (kSwapped ? j : 0), wide = at.wide + (kSwapped ? 0 : j);
    word[j] = &piece.word[sm90_word<kSwapped>(tall, wide, at.piece)];
    sum[j] = kSplit && blocks > 1 ? 0 : int32_t(*word[j]);
  }
  if constexpr (kSplit) {
    if (blocks == 1) return;
#pragma unroll 1
    for (int rank = 0; rank < blocks; ++rank) {
      uint32_t part[kGroup];  // eight loads under way at once
#pragma unroll
      for (int j = 0; j < kGroup; ++j) part[j] = load_shared_cluster(word[j], uint32_t(rank));
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum[j] += int32_t(part[j]);
    }
  }
}

// Scales, bias, activation and the store of eight sums; (row, column) in the tile at (m, n).
template <class Factors>
TT_DEVICE void sm90_finish(const EpilogueParams& e, const Factors& factors, int m, int n, int row,
                           int column, const int32_t (&sum)[kGroup]) {
  if (m + row >= e.M || n + column >= e.N) return;
  ColumnGroup columns;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    columns.scale[j] = factors.b_scale[column + j];
    columns.bias[j] = factors.bias[column + j];
  }
  float t[kGroup];
  finish_group(e, factors.a_scale[row], columns, sum, t);
  store_group(e, m + row, n + column, factors.inverse, t);
}

// Pass `pass` over the pieces of `warp`, whose first wide row in the tile is first_wide.
template <class Shared>
TT_DEVICE void sm90_pass(const Int8MmSm90Params& p, const Shared& s, int m, int n, int warpgroup,
                         int warp, int pass, int first_wide, int lane) {
  const Sm90Eight at = sm90_eight<Shared::kSwapped>(pass, lane);
  int32_t sum[kGroup];
  sm90_read<Shared::kSwapped, Shared::kSplit>(s.sums[warp][at.piece], at, p.cluster, sum);
  const int tall = warp * 16 + at.tall, wide = first_wide + at.piece * 8 + at.wide;
  sm90_finish(p.epilogue, s.factors[warpgroup], m, n, Shared::kSwapped ? wide : tall,
              Shared::kSwapped ? tall : wide, sum);
}

// A tile of one block, 32 wide rows at a time: each warp writes and reads its own pieces. The loop is not
// unrolled, so that the epilogue's code stands once; d[] wants constant indices, hence the choice inside.
template <class Shared>
TT_DEVICE void sm90_output(const Int8MmSm90Params& p, Shared& s, int m, int n, int warp, int lane,
                           const int32_t (&d)[Shared::kWide / 2]) {
  constexpr int kPieces = Shared::kPieces, kChunks = Shared::kWide / 8 / kPieces;
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (c == chunk) sm90_write<Shared::kSwapped>(s.sums[warp], d, 4 * kPieces * c, lane);
    __syncwarp();
#pragma unroll 1
    for (int pass = 0; pass < kPieces / 2; ++pass)
      sm90_pass(p, s, m, n, warp / 4, warp, pass, chunk * kPieces * 8, lane);
    __syncwarp();
  }
}

// A warp's arrival at a barrier of all blocks of the cluster, after what its lanes read and wrote.
TT_DEVICE void sm90_tell(uint64_t* barrier, int blocks, int lane) {
  __syncwarp();
  if (blocks == 1) {
    if (lane == 0) mbarrier_arrive(barrier);
  } else if (lane < blocks) {
    mbarrier_release_cluster(barrier, uint32_t(lane));
  }
}

// A tile that the cluster's blocks summed together: every warp of every block takes its share of the passes.
template <class Shared>
TT_DEVICE void sm90_output_split(const Int8MmSm90Params& p, Shared& s, int m, int n, int rank,
                                 int warp, int lane, uint32_t tile_parity,
                                 const int32_t (&d)[Shared::kWide / 2]) {
  constexpr int kPasses = Shared::kPieces / 2;  // a warp's pieces
  mbarrier_wait_cluster(&s.read, tile_parity ^ 1);  // the last tile's sums; passes at the first
  sm90_write<Shared::kSwapped>(s.sums[warp], d, 0, lane);
  sm90_tell(&s.written, p.cluster, lane);
  mbarrier_wait_cluster(&s.written, tile_parity);
#pragma unroll 1
  for (int i = rank * kSm90Warps + warp; i < kSm90Warps * kPasses; i += p.cluster * kSm90Warps)
    sm90_pass(p, s, m, n, warp / 4, i / kPasses, i % kPasses, 0, lane);
  sm90_tell(&s.read, p.cluster, lane);
}

}  // namespace
}  // namespace trimtab
