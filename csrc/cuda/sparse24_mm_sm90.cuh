// sparse24_linear's product for Hopper: TMA, mbarriers and wgmma.sp.
//
// wgmma wants its sparse operand first, so the weight is tall and x wide, as in int8_mm_sm90.cuh with kSwapped:
//
//   producer warp   waits for an empty stage, lets TMA fill it: 128 bytes of K of kWide tokens, the 64 bytes of
//                   kept weights of 128 rows that meet them, and their metadata
//   2 warpgroups    wait for a full stage; each multiplies its 64 weight rows by all tokens, two products a
//                   stage; then sums -> shared memory -> outputs, eight columns a lane
//
// Two blocks may share the tokens of a tile: each loads half of them for both (multicast).
//
// By stage and 256 tokens: 512 cycles of the tensor cores (8192 int8 multiply-adds of the whole weight a
// cycle), 40 KB written to and 72 KB read from shared memory: 900 cycles of its 128 bytes. So not the tensor
// cores but shared memory bounds it, at 1.14 times the dense rate: each 64 x 256 product reads 16 KB of tokens.
#pragma once
#include "cuda/int8_mm.cuh"
#include "cuda/int8_mm_sm90_output.cuh"
#include "cuda/sparse24_mm_sm80.cuh"

namespace trimtab {

struct Sparse24Sm90Params {
  CUtensorMap tall, wide, metadata;
  EpilogueParams epilogue;
  int32_t units, tall_units, wide_units, group;  // as in Int8MmSm90Params
  int32_t steps;  // of 128 bytes of K
  int32_t rows16, blocks64;  // of the metadata
  int32_t cluster;  // 1, or 2 where two blocks share tokens
};

namespace {

template <class T, int kWide_>
struct Sparse24Sm90Shared {
  static constexpr int kWide = kWide_, kPieces = 4;
  static constexpr int kMetaBlocks = Sparse24Type<T>::kMetaBlocks;
  static constexpr int kMetaWords = kSm90Tall / 16 * 32;  // of a block of 64 columns
  static constexpr int kStageBytes = kWide * 128 + kSm90Tall * 64 + kMetaBlocks * kMetaWords * 4;
  static constexpr int kOtherBytes = kSm90Warps * kPieces * int(sizeof(Sm90Piece)) + 512;
  // wide 256: 5; 128: 8; 64: 11 or 12
  static constexpr int kStages = (kSm90SharedBytes - kOtherBytes) / kStageBytes;

  int8_t wide[kStages][kWide * 128];
  int8_t tall[kStages][kSm90Tall * 64];
  uint32_t metadata[kStages][kMetaBlocks][kMetaWords];
  Sm90Piece sums[kSm90Warps][kPieces];
  uint64_t full[kStages], empty[kStages];
};

struct Sparse24Sm90Tile {
  int n, m;  // first weight row, first token
};

template <class Shared>
TT_DEVICE Sparse24Sm90Tile sparse24_tile(const Sparse24Sm90Params& p, int unit, int rank) {
  const int of_group = p.group * p.wide_units;
  const int first = unit / of_group * p.group, rest = unit % of_group;
  const int left = p.tall_units - first, tall_units = left < p.group ? left : p.group;
  const int tall = first + rest % tall_units;
  return {(tall * p.cluster + rank) * kSm90Tall, rest / tall_units * Shared::kWide};
}

// --- the producer: one thread

template <class Shared>
TT_DEVICE void sparse24_produce(const Sparse24Sm90Params& p, Shared& s, int rank) {
  constexpr int kHalf = Shared::kWide / 2;
  Sm90Ring<Shared::kStages> ring;
#pragma unroll 1
  for (int unit = int(blockIdx.x) / p.cluster; unit < p.units; unit += int(gridDim.x) / p.cluster) {
    const Sparse24Sm90Tile tile = sparse24_tile<Shared>(p, unit, rank);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      uint64_t* full = &s.full[ring.stage];
      mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);  // passes in the first round
      mbarrier_arrive_expect(full, Shared::kStageBytes);  // whole boxes: zeros outside count too
      tma_load(s.tall[ring.stage], &p.tall, step * 64, tile.n, full);
#pragma unroll
      for (int i = 0; i < Shared::kMetaBlocks; ++i)
        tma_load(s.metadata[ring.stage][i], &p.metadata, (step * Shared::kMetaBlocks + i) * 128,
                 tile.n / 16, full);
      if (p.cluster > 1)  // half of the tokens, to both blocks
        tma_load_multicast(s.wide[ring.stage] + rank * kHalf * 128, &p.wide, step * 128,
                           tile.m + rank * kHalf, full, 0b11);
      else tma_load(s.wide[ring.stage], &p.wide, step * 128, tile.m, full);
    }
  }
}

// --- the products

template <class T, int kHalf, class Sum, int kSums>
TT_DEVICE void wgmma_sp(Sum (&d)[kSums], uint64_t a, uint64_t b, uint32_t e, bool add) {
  if constexpr (sizeof(T) == 1) wgmma_sp_s8(d, a, b, e, add);
  else if constexpr ((std::is_same<T, bf16>::value)) wgmma_sp_bf16<kHalf>(d, a, b, e, add);
  else wgmma_sp_fp16<kHalf>(d, a, b, e, add);
}

// A lane's metadata of the stage: of half a step for int8, of the whole step twice for 16 bits. What lies outside
// came as zeros, which are no positions: any valid ones serve, what meets them is zero or not stored.
template <class Shared>
TT_DEVICE void load_metadata(const Sparse24Sm90Params& p, const Shared& s, int stage, int step,
                             int row16, bool row_exists, int lane, uint32_t (&e)[2]) {
#pragma unroll
  for (int i = 0; i < Shared::kMetaBlocks; ++i) {
    const int at = row16 * 32 + (lane / 4 ^ row16) * 4 + lane % 4;  // TMA's swizzle
    const bool exists = row_exists && step * Shared::kMetaBlocks + i < p.blocks64;
    e[i] = exists ? s.metadata[stage][i][at] : 0x44444444u;
  }
  if (Shared::kMetaBlocks == 1) e[1] = e[0];
}

TT_DEVICE void sparse24_release(const Sparse24Sm90Params& p, uint64_t* empty, int lane) {
  if (p.cluster == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else if (lane < p.cluster) {
    mbarrier_arrive_cluster(empty, uint32_t(lane));
  }
}

// d = the sums of the tile
template <class T, class Shared, class Sum>
TT_DEVICE void sparse24_multiply(const Sparse24Sm90Params& p, Shared& s,
                                 const Sparse24Sm90Tile& tile, int warp, int lane,
                                 Sm90Ring<Shared::kStages>& ring, Sum (&d)[Shared::kWide / 2]) {
  const bool row_exists = tile.n / 16 + warp < p.rows16;
  wgmma_pin(d);
#pragma unroll 1
  for (int step = 0; step < p.steps; ++step, ring.next()) {
    const uint64_t tall = wgmma_descriptor64(s.tall[ring.stage] + warp / 4 * 64 * 64);
    const uint64_t wide = wgmma_descriptor(s.wide[ring.stage]);
    mbarrier_wait(&s.full[ring.stage], ring.parity);
    uint32_t e[2];
    load_metadata(p, s, ring.stage, step, warp, row_exists, lane, e);
    wgmma_fence();
    // 32 bytes of the weight and 64 of the tokens on: 2 and 4 in a descriptor
    wgmma_sp<T, 0>(d, tall, wide, e[0], step > 0);
    wgmma_sp<T, 1>(d, tall + 2, wide + 4, e[1], true);
    wgmma_commit();
    // Until then the metadata's registers are in use; meanwhile the other warpgroup multiplies.
    wgmma_wait<0>();
    sparse24_release(p, &s.empty[ring.stage], lane);
  }
  wgmma_pin(d);
}

// --- sums to outputs: int8_mm_sm90_output.cuh's way, for either kind of sums

template <class Sum>
TT_DEVICE uint32_t sum_bits(Sum sum) {
  if constexpr (sizeof(Sum) == 4 && (std::is_same<Sum, float>::value)) return float_bits(sum);
  else return uint32_t(sum);
}
TT_DEVICE void sum_of_bits(uint32_t bits, float& sum) { sum = float_from_bits(bits); }
TT_DEVICE void sum_of_bits(uint32_t bits, int32_t& sum) { sum = int32_t(bits); }

template <class Sum, int kPieces, int kSums>
TT_DEVICE void sparse24_write(Sm90Piece (&pieces)[kPieces], const Sum (&d)[kSums], int first,
                              int lane) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    Bytes16 four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.word[j] = sum_bits(d[first + 4 * i + j]);
    *reinterpret_cast<Bytes16*>(&pieces[i].word[sm90_slot<true>(lane / 4, lane % 4, i)]) = four;
  }
}

// A lane's weight rows are the same eight in every pass: scales and biases are loaded once a tile.
template <class Shared, class Sum>
TT_DEVICE void sparse24_output(const Sparse24Sm90Params& p, Shared& s, const Sparse24Sm90Tile& tile,
                               int warp, int lane, const Sum (&d)[Shared::kWide / 2]) {
  constexpr int kPieces = Shared::kPieces, kChunks = Shared::kWide / 8 / kPieces;
  const EpilogueParams& out = p.epilogue;
  const int n = tile.n + warp * 16 + sm90_eight<true>(0, lane).tall;
  const ColumnGroup columns = load_columns(out, n, 1);
  const float inverse = load_inverse(out);
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (c == chunk) sparse24_write(s.sums[warp], d, 4 * kPieces * c, lane);
    __syncwarp();
#pragma unroll 1
    for (int pass = 0; pass < kPieces / 2; ++pass) {
      const Sm90Eight at = sm90_eight<true>(pass, lane);
      const int m = tile.m + (chunk * kPieces + at.piece) * 8 + at.wide;
      if (m >= out.M || n >= out.N) continue;
      Sum sum[kGroup];
      float t[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        sum_of_bits(s.sums[warp][at.piece].word[sm90_word<true>(at.tall + j, at.wide, at.piece)],
                    sum[j]);
      finish_group(out, out.a_scale == nullptr ? 1.0f : load_global(out.a_scale + m), columns, sum,
                   t);
      store_group(out, m, n, inverse, t);
    }
    __syncwarp();
  }
}

// --- the kernel

template <class T, class Shared>
TT_DEVICE void sparse24_consume(const Sparse24Sm90Params& p, Shared& s, int rank) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  Sm90Ring<Shared::kStages> ring;
  typename Sparse24Type<T>::Sum d[Shared::kWide / 2] = {};
#pragma unroll 1
  for (int unit = int(blockIdx.x) / p.cluster; unit < p.units; unit += int(gridDim.x) / p.cluster) {
    const Sparse24Sm90Tile tile = sparse24_tile<Shared>(p, unit, rank);
    sparse24_multiply<T>(p, s, tile, warp, lane, ring, d);
    sparse24_output(p, s, tile, warp, lane, d);
  }
}

template <class T, int kWide>
__global__ void __launch_bounds__(kSm90Threads, 1)
    sparse24_mm_sm90(const __grid_constant__ Sparse24Sm90Params p) {
// Targets without wgmma get an empty kernel; the launcher never goes there.
#if !defined(__CUDA_ARCH__) || defined(TT_SM90A)
  using Shared = Sparse24Sm90Shared<T, kWide>;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&p.tall);
    tensor_map_prefetch(&p.wide);
    tensor_map_prefetch(&p.metadata);
#pragma unroll 1
    for (int i = 0; i < Shared::kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kSm90Warps * p.cluster);
    }
    fence_mbarrier_init();
  }
  if (p.cluster > 1) cluster_sync();
  else __syncthreads();
  if (threadIdx.x >= 128 * kSm90Warpgroups) {
    if constexpr (kWide == 256) setmaxnreg_dec<40>();  // as int8_mm_sm90
    if (threadIdx.x == 128 * kSm90Warpgroups) sparse24_produce(p, s, rank);
    __syncwarp();
  } else {
    if constexpr (kWide == 256) setmaxnreg_inc<232>();
    sparse24_consume<T>(p, s, rank);
  }
  // The other block still arrives at this one's barriers.
  if (p.cluster > 1) cluster_sync();
#endif
}

// --- the host's side

// Whether it serves: wgmma is an instruction of 9.0 alone, TMA wants rows on 16 bytes, and below 64 tokens the tile
// is mostly empty.
inline bool sparse24_sm90_serves(const Sparse24Params& from, const DeviceFacts& facts) {
  return facts.arch == 90 && facts.shared_bytes >= kSm90SharedBytes && from.epilogue.M > 32 &&
         from.x_bytes > 0 && rows_aligned16(from.x, from.x_stride, from.epilogue.M);
}

// Tokens of a tile, 64, 128 or 256: by cycles of shared memory for the tiles of one multiprocessor. A step writes
// 128 wide + 9216 bytes and reads 4 (64 wide + 2048), 128 a cycle.
inline int sparse24_sm90_wide(int64_t M, int64_t N, int sm_count) {
  int best = 0;
  int64_t least = 0;
  for (const int wide : {256, 128, 64}) {
    const int64_t tiles = sm90_ceil(M, wide) * sm90_ceil(N, kSm90Tall);
    const int64_t cycles = sm90_ceil(tiles, sm_count) * (3 * wide + 136);
    if (best != 0 && cycles >= least) continue;
    best = wide;
    least = cycles;
  }
  return best;
}

template <class T, int kWide>
tt_status launch_sparse24_sm90(const char* op, const Sparse24Params& from, const DeviceFacts& facts,
                               tt_stream stream) {
  using Shared = Sparse24Sm90Shared<T, kWide>;
  static_assert(Shared::kStages >= 3 && sizeof(Shared) <= kSm90SharedBytes, "stages");
  const int64_t M = from.epilogue.M, N = from.epilogue.N;
  const int64_t tall_tiles = sm90_ceil(N, kSm90Tall), wide_tiles = sm90_ceil(M, kWide);
  Sm90Plan plan = {};
  plan.wide = kWide;
  // Pairs halve what the tokens cost in L2; a lone tall tile has no one to share with.
  plan.cluster =
      tall_tiles > 1 && facts.sm_count > 1 && tall_tiles * wide_tiles > facts.sm_count ? 2 : 1;
  plan.tall_units = int(sm90_ceil(tall_tiles, plan.cluster));
  plan.wide_units = int(wide_tiles);
  Sparse24Sm90Params p;
  p.units = plan.tall_units * plan.wide_units;
  const int resident = sm90_resident(facts.sm_count, plan.cluster);
  plan.clusters = p.units < resident ? p.units : resident;
  p.epilogue = from.epilogue;
  p.tall_units = plan.tall_units;
  p.wide_units = plan.wide_units;
  p.group = sm90_group(plan);
  p.steps = int32_t(sm90_ceil(from.x_bytes, 128));
  p.rows16 = int32_t(sm90_ceil(N, 16));
  p.blocks64 = from.blocks64;
  p.cluster = plan.cluster;
  const auto stride_of = [](int64_t rows, int64_t stride, int64_t bytes) {
    return rows == 1 ? sm90_ceil(bytes, 16) * 16 : stride;  // one row may come with any
  };
  tt_status status =
      make_tensor_map(op, &p.tall, from.values, N, from.values_bytes,
                      stride_of(N, from.values_stride, from.values_bytes), kSm90Tall, 64);
  if (status == TT_OK)
    status = make_tensor_map(op, &p.wide, from.x, M, from.x_bytes,
                             stride_of(M, from.x_stride, from.x_bytes), kWide / plan.cluster);
  if (status == TT_OK)
    status = make_tensor_map(op, &p.metadata, from.metadata, p.rows16, int64_t(p.blocks64) * 128,
                             int64_t(p.blocks64) * 128, kSm90Tall / 16);
  if (status != TT_OK) return status;
  LaunchShape shape;
  shape.grid = dim3(unsigned(plan.clusters * plan.cluster));
  shape.block = dim3(kSm90Threads);
  shape.shared_bytes = int(sizeof(Shared));
  shape.cluster = plan.cluster;
  return launch(op, sparse24_mm_sm90<T, kWide>, shape, p, stream);
}

template <class T>
tt_status launch_sparse24_sm90(const char* op, const Sparse24Params& from, const DeviceFacts& facts,
                               tt_stream stream) {
  switch (sparse24_sm90_wide(from.epilogue.M, from.epilogue.N, facts.sm_count)) {
    case 256: return launch_sparse24_sm90<T, 256>(op, from, facts, stream);
    case 128: return launch_sparse24_sm90<T, 128>(op, from, facts, stream);
    default: return launch_sparse24_sm90<T, 64>(op, from, facts, stream);
  }
}

}  // namespace
}  // namespace trimtab
