// Kernels that test the sm_90 part of the SIMT machine: a warp-specialized product with every wrapper in
// use, from which one step at a time can be left out, and one misuse of each kind that must be reported.
#include "cuda/launch.cuh"
#include "cuda/ptx_sm90.cuh"

namespace trimtab {
namespace {

// --- out[M, N] = a[M, K] b[N, K]^T in int32

constexpr int kTile = 64;  // rows and columns of a block's tile
constexpr int kStep = 128;  // bytes of K of a stage
constexpr int kStages = 2;
constexpr int kThreads = 256;  // warpgroup 0 multiplies, a thread of warpgroup 1 loads
constexpr int kCluster = 2;  // blocks one below the other; each loads half of b for both

// What is left out or done wrong. The names of tests/test_simt_sm90.py, in its order.
enum Mutation {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kFullParity,
  kEmptyParity,
  kNoInitFence,
  kNoInitSync,
  kNoRemoteArrive,
  kTooFewBytes,
  kTooManyBytes,
  kMulticastToOne,
  kWrongHalf,
  kNoProductFence,
  kNoCommit,
  kNoProductWait,
  kEarlyRelease,
  kSumsKept,
  kWrongChunk,
  kNoProxyFence,
  kFenceTooEarly,
  kNoStoreBarrier,
  kNoSwizzle,
  kNoStoreCommit,
  kNoReadWait,
  kNoLastReadWait,
  kNoLastSync,
};

struct Params {
  CUtensorMap a, b, out;  // out: bytes, four to a sum
  int N, K;
  int mutation;
};

struct Shared {
  int8_t a[kStages][kTile][kStep], b[kStages][kTile][kStep];
  int32_t out[2][kTile][32];  // columns 0-31, 32-63
  uint64_t full[kStages], empty[kStages];
};

TT_DEVICE void load_tiles(Shared& s, const Params& p, int steps, int tiles) {
  const uint32_t rank = cluster_rank();
  const int half = p.mutation == kWrongHalf ? 0 : int(rank);
  uint32_t bytes = 2 * kTile * kStep;
  if (p.mutation == kTooFewBytes) bytes -= 32 * kStep;
  if (p.mutation == kTooManyBytes) bytes += 32 * kStep;
  for (int i = 0; i < tiles * steps; ++i) {
    const int stage = i % kStages, k = i % steps * kStep, n = i / steps * kTile;
    const uint32_t parity = uint32_t(i / kStages) & 1;
    if (p.mutation != kNoEmptyWait)
      mbarrier_wait(&s.empty[stage], parity ^ (p.mutation == kEmptyParity ? 0 : 1));
    mbarrier_arrive_expect(&s.full[stage], bytes);
    tma_load(s.a[stage], &p.a, k, int(blockIdx.x) * kTile, &s.full[stage]);
    tma_load_multicast(s.b[stage][32 * rank], &p.b, k, n + 32 * half, &s.full[stage],
                       p.mutation == kMulticastToOne ? uint16_t(1 << rank) : uint16_t(3));
  }
}

// Thread r of the warpgroup tells block r that this one has read the stage.
TT_DEVICE void release(Shared& s, const Params& p, int stage) {
  const uint32_t rank = threadIdx.x;
  if (rank >= kCluster || (p.mutation == kNoRemoteArrive && rank != cluster_rank())) return;
  mbarrier_arrive_cluster(&s.empty[stage], rank);
}

// The tile's sums; `i` counts stages from the kernel's start. One product is under way while the next
// stage is waited for.
TT_DEVICE void multiply_tile(int32_t (&d)[32], Shared& s, const Params& p, int steps, int& i) {
  for (int step = 0; step < steps; ++step, ++i) {
    const int stage = i % kStages;
    const uint32_t parity = uint32_t(i / kStages) & 1;
    if (p.mutation != kNoFullWait)
      mbarrier_wait(&s.full[stage], parity ^ (p.mutation == kFullParity ? 1 : 0));
    if (p.mutation != kNoProductFence) wgmma_fence();
    for (int k = 0; k < kStep; k += 32) {
      const int chunk = p.mutation == kWrongChunk && k == 96 ? 64 : k;
      wgmma_s8(d, wgmma_descriptor(&s.a[stage][0][k]), wgmma_descriptor(&s.b[stage][0][chunk]),
               step != 0 || k != 0 || p.mutation == kSumsKept);
    }
    if (p.mutation != kNoCommit) wgmma_commit();
    if (p.mutation == kEarlyRelease) {
      release(s, p, stage);
      continue;
    }
    wgmma_wait<1>();
    if (step != 0) release(s, p, (i - 1) % kStages);
  }
  if (p.mutation != kNoProductWait) wgmma_wait<0>();
  wgmma_pin(d);
  if (p.mutation != kEarlyRelease) release(s, p, (i - 1) % kStages);
}

TT_DEVICE void store_tile(const int32_t (&d)[32], Shared& s, const Params& p, int n) {
  const int thread = int(threadIdx.x), row0 = thread / 32 * 16 + thread % 32 / 4;
  if (thread == 0 && p.mutation != kNoReadWait) tma_store_wait_read<0>();
  named_barrier_sync(1, 128);
  if (p.mutation == kFenceTooEarly) fence_proxy_async();
  for (int i = 0; i < 32; ++i) {
    const int row = row0 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    const int chunk = column % 32 / 4 ^ (p.mutation == kNoSwizzle ? 0 : row % 8);
    s.out[column / 32][row][4 * chunk + column % 4] = d[i];
  }
  if (p.mutation != kNoProxyFence && p.mutation != kFenceTooEarly) fence_proxy_async();
  if (p.mutation != kNoStoreBarrier) named_barrier_sync(2, 128);
  if (thread != 0) return;
  for (int half = 0; half < 2; ++half)
    tma_store(&p.out, s.out[half], 4 * (n + 32 * half), int(blockIdx.x) * kTile);
  if (p.mutation != kNoStoreCommit) tma_store_commit();
}

TT_DEVICE void initialise(Shared& s, const Params& p) {
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&p.a);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kCluster);
    }
    if (p.mutation != kNoInitFence) fence_mbarrier_init();
  }
  if (p.mutation != kNoInitSync) cluster_sync();
}

__global__ void __launch_bounds__(kThreads) product(const __grid_constant__ Params p) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int steps = (p.K + kStep - 1) / kStep, tiles = (p.N + kTile - 1) / kTile;
  initialise(s, p);
  if (threadIdx.x >= 128) {
    setmaxnreg_dec<40>();
    if (threadIdx.x == 128) load_tiles(s, p, steps, tiles);
  } else {
    setmaxnreg_inc<232>();
    int i = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      int32_t d[32];
      multiply_tile(d, s, p, steps, i);
      store_tile(d, s, p, tile * kTile);
    }
    if (threadIdx.x == 0 && p.mutation != kNoLastReadWait) tma_store_wait_read<0>();
  }
  if (p.mutation != kNoLastSync) cluster_sync();
}

// --- one misuse each

struct MisuseParams {
  CUtensorMap map;  // boxes of 8 x 128
  CUtensorMap outside;  // beyond the tensor that was registered
  int which;
};

struct MisuseShared {
  int8_t tile[64][128];
  uint64_t barrier[2];
};

TT_DEVICE void misuse_mbarrier(MisuseShared& s, int which) {
  if (threadIdx.x != 0) return;
  if (which == 0) mbarrier_wait(&s.barrier[1], 0);
  if (which == 1) mbarrier_arrive_expect(s.barrier, 16), mbarrier_arrive(s.barrier);
  if (which == 2) mbarrier_init(s.barrier, 1);
  if (which == 3) s.barrier[0] ^= 1, mbarrier_arrive(s.barrier);
  if (which == 4) mbarrier_wait(s.barrier, 2);
  if (which == 5) mbarrier_wait(s.barrier, 0);  // deadlock
  if (which == 6) mbarrier_arrive_cluster(s.barrier, 2);
  if (which == 7 && cluster_rank() == 0)
    mbarrier_init(&s.barrier[1], 1), mbarrier_arrive_cluster(&s.barrier[1], 0);
  if (which == 8) mbarrier_init(&s.barrier[1], 0);
}

TT_DEVICE void misuse_copies(MisuseShared& s, const MisuseParams& p) {
  if (threadIdx.x != 0) return;
  const CUtensorMap* map = p.which == 13 ? &p.outside : &p.map;
  if (p.which == 10) mbarrier_arrive_expect(s.barrier, 512), tma_load(s.tile, map, 0, 0, s.barrier);
  if (p.which == 11) tma_load(s.tile[1], map, 0, 0, s.barrier);
  if (p.which == 12) tma_load_multicast(s.tile, map, 0, 0, s.barrier, 4);
  if (p.which == 13) tma_load(s.tile, map, 0, 0, s.barrier);
  if (p.which == 14)
    mbarrier_arrive_expect(s.barrier, 1024), tma_load(s.tile, map, 0, 0, s.barrier);
  if (p.which == 15) {
    const CUtensorMap none = {};
    tma_load(s.tile, &none, 0, 0, s.barrier);
  }
  if (p.which == 16) mbarrier_init(&s.barrier[1], 1), tma_load(s.tile, map, 0, 0, &s.barrier[1]);
  if (p.which == 17) tma_store(map, s.tile, 0, 0), tma_store_commit();
  if (p.which == 18) tma_store(map, s.tile, 0, 0), tma_store_wait_read<0>();
}

TT_DEVICE void misuse_products(MisuseShared& s, int which) {
  const int thread = int(threadIdx.x);
  const uint64_t tile = wgmma_descriptor(s.tile);
  int32_t d[32] = {};
  if (which < 20 || which > 29) return;
  if (which != 20) wgmma_fence();
  if (which == 20) wgmma_s8(d, tile, tile, false);
  if (which == 21) {
    wgmma_s8(d, thread == 77 ? tile + 2 : tile, tile, false);
    wgmma_commit(), wgmma_wait<0>();
  }
  if (which == 22) wgmma_s8(d, tile + 64, tile, false);
  if (which == 23) wgmma_s8(d, tile ^ (uint64_t{3} << 62), tile, false);
  if (which == 24) wgmma_s8(d, tile, tile, false), d[3] = 1, wgmma_commit(), wgmma_wait<0>();
  if (which == 25) wgmma_s8(d, tile, tile, false), wgmma_commit();
  if (which == 26 && thread < 96) wgmma_s8(d, tile, tile, false), wgmma_commit(), wgmma_wait<0>();
  if (which == 27) wgmma_s8(d, tile + 8, tile, false);
  if (which == 28) {
    int32_t wide[64] = {};
    wgmma_s8(wide, tile, tile, false);  // 128 rows of b where shared memory has 64
  }
}

// Sums of another block read without what orders them.
TT_DEVICE void misuse_loads(MisuseShared& s, int which) {
  if (which != 36 && which != 37) return;
  if (threadIdx.x == 0) mbarrier_init(&s.barrier[1], 2), fence_mbarrier_init();
  cluster_sync();
  if (threadIdx.x == 0) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      if (which == 36) mbarrier_release_cluster(&s.barrier[1], rank);
      if (which == 37 && rank == 0) mbarrier_release_cluster(&s.barrier[1], rank);
      if (which == 37 && rank == 1) mbarrier_arrive_cluster(&s.barrier[1], rank);
    }
    if (which == 36) mbarrier_wait(&s.barrier[1], 0);
    if (which == 37) mbarrier_wait_cluster(&s.barrier[1], 0);
    load_shared_cluster(reinterpret_cast<uint32_t*>(s.tile), cluster_rank() ^ 1);
  }
  cluster_sync();
}

TT_DEVICE void misuse_registers(int which) {
  const bool first = threadIdx.x < 128;
  if (which == 30) setmaxnreg_dec<100>();
  if (which == 31) {
    setmaxnreg_dec<40>();
    setmaxnreg_dec<48>();
  }
  if (which == 32) setmaxnreg_inc<264>();
  if (which == 33 && first && threadIdx.x != 5) setmaxnreg_inc<232>();
  if (which == 34) cluster_sync(), setmaxnreg_inc<256>(), setmaxnreg_dec<24>();
  if (which == 35 && threadIdx.x % 2 == 0) cluster_sync();
}

__global__ void misuse(const __grid_constant__ MisuseParams p) {
  MisuseShared& s = *reinterpret_cast<MisuseShared*>(shared_memory());
  if (threadIdx.x == 0) {
    mbarrier_init(s.barrier, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (p.which < 10) misuse_mbarrier(s, p.which);
  if (p.which >= 10 && p.which < 20) misuse_copies(s, p);
  misuse_products(s, p.which);
  misuse_registers(p.which);
  misuse_loads(s, p.which);
}

}  // namespace
}  // namespace trimtab

extern "C" {

// Strides are K and 4 N bytes, both multiples of 16.
TT_API tt_status simt_sm90_product(const int8_t* a, const int8_t* b, int32_t* out, int M, int N,
                                   int K, int mutation) {
  using namespace trimtab;
  Params p = {};
  p.N = N, p.K = K, p.mutation = mutation;
  tt_status status = make_tensor_map("product", &p.a, a, M, K, K, kTile);
  if (status == TT_OK) status = make_tensor_map("product", &p.b, b, N, K, K, kTile / 2);
  if (status == TT_OK) status = make_tensor_map("product", &p.out, out, M, 4 * N, 4 * N, kTile);
  if (status != TT_OK) return status;
  const unsigned blocks = (unsigned(M) + kTile - 1) / kTile;
  const dim3 grid((blocks + kCluster - 1) / kCluster * kCluster);
  const LaunchShape shape = {grid, dim3(kThreads), int(sizeof(Shared)), kCluster};
  return launch("product", product, shape, p, nullptr);
}

// tensor: 8 rows of 128 bytes, to which a kernel may write.
TT_API tt_status simt_sm90_misuse(int which, int8_t* tensor, int threads) {
  using namespace trimtab;
  MisuseParams p = {};
  p.which = which;
  tt_status status = make_tensor_map("misuse", &p.map, tensor, 8, 128, 128, 8);
  if (status == TT_OK) status = make_tensor_map("misuse", &p.outside, tensor, 9, 128, 128, 16);
  if (status != TT_OK) return status;
  const int bytes = which == 11 ? 1 << 14 : int(sizeof(MisuseShared));
  const LaunchShape shape = {dim3(2), dim3(unsigned(threads)), bytes, 2};
  return launch("misuse", misuse, shape, p, nullptr);
}

TT_API tt_status simt_sm90_map(const void* data, int64_t rows, int64_t columns, int64_t stride,
                               int box_rows) {
  CUtensorMap map;
  return trimtab::make_tensor_map("map", &map, data, rows, columns, stride, box_rows);
}
}
