// Which tile and cluster the sm_90 int8_mm uses: a small model in clock cycles, on the host.
//
// A tile is 128 rows of one operand (tall: two warpgroups, 64 each) by kWide rows of the other (the n of
// wgmma). By 128 bytes of K, on one multiprocessor:
//
//   tensor cores  1979 TOPS / (132 SMs * 1.83 GHz) = 4096 multiply-adds a cycle: 128 * wide * 128 / 4096
//                 = 4 wide (a m64n256k32 takes 128 cycles)
//   shared memory 128 bytes a cycle. The copies write (128 + wide) * 128 bytes; each of the 8 wgmma reads
//                 its 64 x 32 tall and wide x 32 wide bytes: 128 + wide + 8 (16 + wide / 4) = 256 + 3 wide
//   L2            (128 + wide / pair) * 128 bytes, where pair blocks of a cluster share the wide operand
//
//   wide   tensor cores   shared memory   L2 at 32 bytes a cycle, pair 1 and 2
//     64            256             448    768
//    128            512             640   1024    768
//    192            768             832   1280    896
//    256           1024            1024   1536   1024
//
// So only 128 x 256 in pairs can keep the tensor cores busy, and that is the default; two tiles of 64 x 256 in
// ping-pong would hide the epilogue, but need 320 + 320 cycles of shared memory for 512 of tensor cores. At
// K = 4096 such a tile takes 32768 cycles and its epilogue 3600 (14 instructions a value, 128 lanes a
// cycle), part of it beside the other warpgroup's products.
//
// Smaller tiles serve where large ones leave multiprocessors without work: in the last wave, or where M
// is small. The rates of L2 and memory, kSm90Start and kSm90Exchange are unmeasured guesses.
#pragma once
#include <cstdint>

namespace trimtab {

constexpr int kSm90Tall = 128;
constexpr int kSm90Depth = 128;  // bytes of K a stage: a row of the 128-byte swizzle

constexpr double kSm90L2Rate = 32;  // bytes a cycle a multiprocessor (5.7 TB/s at 1.4 GHz)
constexpr double kSm90MemoryRate = 15;  // 3.35 TB/s / (132 * 1.7 GHz)
constexpr double kSm90Start = 3000;  // launch, first copies, last stores
constexpr double kSm90Exchange = 800;  // sums between the blocks of a cluster

struct Sm90Plan {
  int wide;  // 32, 64, 128, 192 or 256
  bool swapped;  // tall is b and wide is a: few tokens then waste no rows of wgmma
  bool split;  // the blocks of a cluster share out a tile's K; else they share the wide operand
  int cluster;  // blocks: 1, 2, 4 or 8 where split, else 1 or 2
  int tall_units, wide_units;  // tiles; without split, a tall unit is `cluster` of them
  int clusters;  // launched
  double cycles;
};

// The kernels there are.
struct Sm90Kind {
  int wide;
  bool swapped, split;
  int least_cluster, most_cluster;
};
constexpr Sm90Kind kSm90Kinds[] = {
    {256, false, false, 1, 2}, {192, false, false, 1, 2}, {128, false, false, 1, 2},
    {128, false, true, 2, 8},  {64, false, true, 1, 8},   {64, true, true, 1, 8},
    {32, true, true, 1, 8},
};

inline int64_t sm90_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Clusters that are resident at once. The graphics processing clusters of an H100 have 16 or 18
// multiprocessors, so clusters of 4 and 8 leave some idle.
inline int sm90_resident(int sm_count, int cluster) {
  const int clusters =
      cluster <= 2 || sm_count < 8 ? sm_count / cluster : sm_count / 8 * 8 / cluster;
  return clusters > 0 ? clusters : 1;
}

inline Sm90Plan sm90_plan_of(int64_t M, int64_t N, int64_t K, int sm_count, const Sm90Kind& kind,
                             int cluster, double epilogue) {
  const int wide = kind.wide, pair = kind.split ? 1 : cluster, parts = kind.split ? cluster : 1;
  const int64_t tall_tiles = sm90_ceil(kind.swapped ? N : M, kSm90Tall);
  Sm90Plan plan = {wide, kind.swapped, kind.split, cluster, 0, 0, 0, 0};
  plan.tall_units = int(sm90_ceil(tall_tiles, pair));
  plan.wide_units = int(sm90_ceil(kind.swapped ? M : N, wide));
  const int64_t units = int64_t(plan.tall_units) * plan.wide_units;
  const int resident = sm90_resident(sm_count, cluster);
  plan.clusters = int(units < resident ? units : resident);

  const auto most = [](double a, double b) { return a > b ? a : b; };
  const auto least = [](double a, double b) { return a < b ? a : b; };
  const double step = most(most(4.0 * wide, 256 + 3.0 * wide),
                           (128 + wide / pair) * double(kSm90Depth) / kSm90L2Rate);
  // 128 values a cycle go through the pipelines of floats. Where a block has more tiles than one, the
  // loads and some of the other warpgroup's products go on beside it.
  const int64_t waves = sm90_ceil(units, plan.clusters);
  double finish = epilogue * wide / parts + (parts > 1 ? kSm90Exchange : 0);
  if (waves > 1) finish *= 0.75;
  const double tile = step * double(sm90_ceil(sm90_ceil(K, kSm90Depth), parts)) + finish;
  const double memory =
      (double(M) * K + double(N) * K + 2.0 * M * N) / (kSm90MemoryRate * sm_count);
  // Neither hides the other wholly; so of two kernels that memory bounds, the one with less to do wins.
  const double busy = double(waves) * tile;
  plan.cycles = kSm90Start + 20.0 * cluster + most(busy, memory) + 0.2 * least(busy, memory);
  return plan;
}

// epilogue: instructions a value
inline Sm90Plan sm90_plan(int64_t M, int64_t N, int64_t K, int sm_count, double epilogue) {
  Sm90Plan best = {};
  for (const Sm90Kind& kind : kSm90Kinds)
    for (int cluster = kind.least_cluster; cluster <= kind.most_cluster; cluster *= 2) {
      if (cluster > 1) {
        if (cluster > sm_count) break;
        // A part of K has two steps or more; a pair has two tall tiles to share between.
        if (kind.split ? sm90_ceil(K, kSm90Depth) < 2 * cluster : M <= kSm90Tall) break;
      }
      const Sm90Plan plan = sm90_plan_of(M, N, K, sm_count, kind, cluster, epilogue);
      if (best.wide == 0 || plan.cycles < best.cycles) best = plan;
    }
  return best;
}

// Tall units that a group of tiles spans before it goes on to the next wide unit: the tiles under way at once
// then read about as much of one operand as of the other, which keeps both in L2.
inline int sm90_group(const Sm90Plan& plan) {
  const double unit_rows = double(kSm90Tall) * (plan.split ? 1 : plan.cluster);
  const double area = double(plan.clusters) * plan.wide / unit_rows;  // group^2
  int group = 1;
  while (double(group + 1) * (group + 1) <= area) ++group;
  return group < plan.tall_units ? group : plan.tall_units;
}

}  // namespace trimtab
