// int8_mm for Hopper: TMA, mbarriers and wgmma (see int8_mm.cuh for the formula).
//
//   producer warp   waits for an empty stage, lets TMA fill it: a [128, 128] box of the tall operand and
//                   [kWide, 128] of the wide one, in the 128-byte swizzle
//   2 warpgroups    wait for a full stage; each multiplies its 64 tall rows by all wide ones, four k32
//                   products a stage; then sums -> shared memory -> outputs, eight columns a lane
//
// tall is a and wide is b, or (kSwapped) the other way round. A block takes one tile after another. The
// producer runs ahead into the next tile while the sums of the last one are finished, and so may either
// warpgroup, by as many stages as there are.
//
// Clusters serve one of two ends (int8_mm_sm90_tiles.cuh):
//   pairs   two blocks have the same wide rows; each loads half of them for both (multicast)
//   kSplit  the blocks share out the K of one tile. Each leaves its sums in its shared memory, and finishes
//           its share of the outputs from everyone's sums. Integers: the order does not matter.
#pragma once
#include "cuda/int8_mm.cuh"
#include "cuda/int8_mm_sm90_output.cuh"

namespace trimtab {
namespace {

// First rows of a unit's tile, and the steps of K that this block multiplies.
struct Sm90Tile {
  int tall, wide, first_step, end_step;
};

template <bool kSplit>
TT_DEVICE Sm90Tile sm90_tile(const Int8MmSm90Params& p, int unit, int rank, int wide) {
  const int of_group = p.group * p.wide_units;
  const int first = unit / of_group * p.group, rest = unit % of_group;
  const int left = p.tall_units - first, tall_units = left < p.group ? left : p.group;
  const int tall = first + rest % tall_units;
  Sm90Tile tile;
  tile.tall = (kSplit ? tall : tall * p.cluster + rank) * kSm90Tall;
  tile.wide = rest / tall_units * wide;
  tile.first_step = kSplit ? p.steps * rank / p.cluster : 0;
  tile.end_step = kSplit ? p.steps * (rank + 1) / p.cluster : p.steps;
  return tile;
}

// --- the producer: one thread

template <class Shared>
TT_DEVICE void sm90_produce(const Int8MmSm90Params& p, Shared& s, int rank) {
  const bool shares = !Shared::kSplit && p.cluster > 1;
  constexpr int kHalf = Shared::kWide / 2;
  Sm90Ring<Shared::kStages> ring;
#pragma unroll 1
  for (int unit = int(blockIdx.x) / p.cluster; unit < p.units; unit += int(gridDim.x) / p.cluster) {
    const Sm90Tile tile = sm90_tile<Shared::kSplit>(p, unit, rank, Shared::kWide);
#pragma unroll 1
    for (int step = tile.first_step; step < tile.end_step; ++step, ring.next()) {
      uint64_t* full = &s.full[ring.stage];
      const int k = step * kSm90Depth;
      mbarrier_wait(&s.empty[ring.stage], ring.parity ^ 1);  // passes in the first round
      mbarrier_arrive_expect(full, Shared::kStageBytes);  // whole boxes: zeros outside count too
      tma_load(s.tall[ring.stage], &p.tall, k, tile.tall, full);
      if (shares)  // rows of half a tile, to both blocks
        tma_load_multicast(s.wide[ring.stage] + rank * kHalf * kSm90Depth, &p.wide, k,
                           tile.wide + rank * kHalf, full, 0b11);
      else tma_load(s.wide[ring.stage], &p.wide, k, tile.wide, full);
    }
  }
}

// --- the products

// This warp is done with the stage, in all blocks that fill it.
template <bool kSplit>
TT_DEVICE void sm90_release(const Int8MmSm90Params& p, uint64_t* empty, int lane) {
  if (kSplit || p.cluster == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else if (lane < p.cluster) {
    mbarrier_arrive_cluster(empty, uint32_t(lane));
  }
}

// d = the sums of the tile, over this block's steps
template <class Shared>
TT_DEVICE void sm90_multiply(const Int8MmSm90Params& p, Shared& s, const Sm90Tile& tile,
                             int warpgroup, int lane, Sm90Ring<Shared::kStages>& ring,
                             int32_t (&d)[Shared::kWide / 2]) {
  int last = 0;  // the stage that the products under way read
  wgmma_pin(d);
#pragma unroll 1
  for (int step = tile.first_step; step < tile.end_step; ++step, ring.next()) {
    const uint64_t tall = wgmma_descriptor(s.tall[ring.stage] + warpgroup * 64 * kSm90Depth);
    const uint64_t wide = wgmma_descriptor(s.wide[ring.stage]);
    mbarrier_wait(&s.full[ring.stage], ring.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSm90Depth / 32; ++k)  // 32 bytes on: 2 in a descriptor
      wgmma_s8(d, tall + uint64_t(2 * k), wide + uint64_t(2 * k), k > 0 || step > tile.first_step);
    wgmma_commit();
    // The next stage's products may be queued behind these; those before them are done.
    wgmma_wait<1>();
    if (step > tile.first_step) sm90_release<Shared::kSplit>(p, &s.empty[last], lane);
    last = ring.stage;
  }
  wgmma_wait<0>();
  sm90_release<Shared::kSplit>(p, &s.empty[last], lane);
  wgmma_pin(d);
}

// --- a warpgroup's life

template <class Shared>
TT_DEVICE void sm90_consume(const Int8MmSm90Params& p, Shared& s, int rank) {
  const int thread = int(threadIdx.x) % 128, lane = thread % 32;
  const int warp = int(threadIdx.x) / 32, warpgroup = warp / 4;
  const int barrier = 1 + warpgroup;
  Sm90Ring<Shared::kStages> ring;
  uint32_t tile_parity = 0;
  int32_t d[Shared::kWide / 2] = {};
#pragma unroll 1
  for (int unit = int(blockIdx.x) / p.cluster; unit < p.units; unit += int(gridDim.x) / p.cluster) {
    const Sm90Tile tile = sm90_tile<Shared::kSplit>(p, unit, rank, Shared::kWide);
    const int m = Shared::kSwapped ? tile.wide : tile.tall,
              n = Shared::kSwapped ? tile.tall : tile.wide;
    Sm90FactorRegisters<Shared::kBlockM, Shared::kBlockN> factors;
    factors.load(p.epilogue, m, n, thread);
    sm90_multiply(p, s, tile, warpgroup, lane, ring, d);
    named_barrier_sync(barrier, 128);  // the last tile's factors have been read
    factors.store(p.epilogue, s.factors[warpgroup], thread);
    named_barrier_sync(barrier, 128);
    if constexpr (Shared::kSplit) sm90_output_split(p, s, m, n, rank, warp, lane, tile_parity, d);
    else sm90_output(p, s, m, n, warp, lane, d);
    tile_parity ^= 1;
  }
}

template <class Shared>
TT_DEVICE void sm90_start(const Int8MmSm90Params& p, Shared& s) {
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&p.tall);
    tensor_map_prefetch(&p.wide);
    const int readers = kSm90Warps * (Shared::kSplit ? 1 : p.cluster);
#pragma unroll 1
    for (int i = 0; i < Shared::kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], readers);
    }
    mbarrier_init(&s.written, kSm90Warps * p.cluster);
    mbarrier_init(&s.read, kSm90Warps * p.cluster);
    fence_mbarrier_init();
  }
  if (p.cluster > 1) cluster_sync();
  else __syncthreads();
}

template <int kWide, bool kSwapped, bool kSplit>
__global__ void __launch_bounds__(kSm90Threads, 1)
    int8_mm_sm90(const __grid_constant__ Int8MmSm90Params p) {
// Targets without wgmma get an empty kernel; the launcher never goes there.
#if !defined(__CUDA_ARCH__) || defined(TT_SM90A)
  using Shared = Sm90Shared<kWide, kSwapped, kSplit>;
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int rank = int(cluster_rank());
  sm90_start(p, s);
  if (threadIdx.x >= 128 * kSm90Warpgroups) {
    // 65536 registers are 168 a thread; 128 * 40 + 256 * 232 fit too, and 232 hold 128 sums with ease.
    if constexpr (kWide == 256) setmaxnreg_dec<40>();
    if (threadIdx.x == 128 * kSm90Warpgroups) sm90_produce(p, s, rank);
    __syncwarp();
  } else {
    if constexpr (kWide == 256) setmaxnreg_inc<232>();
    sm90_consume(p, s, rank);
  }
  // Other blocks of the cluster still arrive at this one's barriers and read its sums.
  if (p.cluster > 1) cluster_sync();
#endif
}

template <int kWide, bool kSwapped, bool kSplit>
tt_status launch_sm90(const char* op, const Int8MmArgs& args, const Sm90Plan& plan,
                      tt_stream stream) {
  using Shared = Sm90Shared<kWide, kSwapped, kSplit>;
  static_assert(Shared::kStages >= 3 && sizeof(Shared) <= kSm90SharedBytes, "stages");
  const int wide_box = kSplit ? kWide : kWide / plan.cluster;
  Int8MmSm90Params p;
  const auto map_of = [&](CUtensorMap* map, bool a, int box_rows) {
    const int64_t rows = a ? args.M : args.N, given = a ? args.a_stride : args.b_stride;
    // One row may come with any stride; the map wants a multiple of 16.
    const int64_t stride = rows == 1 ? sm90_ceil(args.K, 16) * 16 : given;
    return make_tensor_map(op, map, a ? args.a : args.b, rows, args.K, stride, box_rows);
  };
  tt_status status = map_of(&p.tall, !kSwapped, kSm90Tall);
  if (status == TT_OK) status = map_of(&p.wide, kSwapped, wide_box);
  if (status != TT_OK) return status;
  p.epilogue = epilogue_params(args.a_scale, args.M, args.N, args.epilogue);
  p.tall_units = plan.tall_units;
  p.wide_units = plan.wide_units;
  p.units = plan.tall_units * plan.wide_units;
  p.group = sm90_group(plan);
  p.steps = int32_t(sm90_ceil(args.K, kSm90Depth));
  p.cluster = plan.cluster;
  LaunchShape shape;
  shape.grid = dim3(unsigned(plan.clusters * plan.cluster));
  shape.block = dim3(kSm90Threads);
  shape.shared_bytes = int(sizeof(Shared));
  shape.cluster = plan.cluster;
  return launch(op, int8_mm_sm90<kWide, kSwapped, kSplit>, shape, p, stream);
}

}  // namespace

// wgmma is an instruction of 9.0 alone. TMA wants rows on 16 bytes.
inline bool int8_mm_sm90_serves(const Int8MmArgs& args, const DeviceFacts& facts) {
  const int64_t tiles = sm90_ceil(args.M, 32) * sm90_ceil(args.N, 32);
  return facts.arch == 90 && facts.shared_bytes >= kSm90SharedBytes && args.K >= 1 &&
         tiles < int64_t(1) << 30 && rows_aligned16(args.a, args.a_stride, args.M) &&
         rows_aligned16(args.b, args.b_stride, args.N);
}

inline Sm90Plan plan_int8_mm_sm90(const Int8MmArgs& args, const DeviceFacts& facts) {
  // Instructions a value (int8_epilogue.cuh), counted in SASS: relu is one, the others have an exp or an erf
  // and a division.
  const double epilogue = args.epilogue.activation <= TT_ACT_RELU ? 14 : 110;
  return sm90_plan(args.M, args.N, args.K, facts.sm_count, epilogue);
}

inline tt_status launch_int8_mm_sm90(const char* op, const Int8MmArgs& args, const Sm90Plan& plan,
                                     tt_stream stream) {
  if (plan.swapped)
    return plan.wide == 32 ? launch_sm90<32, true, true>(op, args, plan, stream)
                           : launch_sm90<64, true, true>(op, args, plan, stream);
  if (plan.split)
    return plan.wide == 64 ? launch_sm90<64, false, true>(op, args, plan, stream)
                           : launch_sm90<128, false, true>(op, args, plan, stream);
  switch (plan.wide) {
    case 128: return launch_sm90<128, false, false>(op, args, plan, stream);
    case 192: return launch_sm90<192, false, false>(op, args, plan, stream);
    default: return launch_sm90<256, false, false>(op, args, plan, stream);
  }
}

inline tt_status launch_int8_mm_sm90(const char* op, const Int8MmArgs& args, tt_stream stream) {
  DeviceFacts facts;
  const tt_status status = device_facts(op, &facts);
  if (status != TT_OK) return status;
  return launch_int8_mm_sm90(op, args, plan_int8_mm_sm90(args, facts), stream);
}

}  // namespace trimtab
