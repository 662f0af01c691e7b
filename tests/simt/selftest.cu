// Kernels that test the SIMT machine itself: a small tile product that uses every sm_80 wrapper, and one
// misuse of each kind that the machine must report.
#include "cuda/launch.cuh"

namespace trimtab {
namespace {

constexpr int kTile = 32;  // rows and columns of the output of a block, and bytes of K of a stage
constexpr int kStages = 2;  // one is computed on while the other arrives
constexpr int kThreads = 64;

// out[M, N] = a[M, K] b[N, K]^T;  total += the sum of all outputs, modulo 2^32
struct Params {
  const int8_t *a, *b;  // rows K apart, K a multiple of 16
  int32_t* out;
  uint32_t* total;
  int M, N, K;
};

struct Shared {
  int8_t a[kStages][kTile][kTile], b[kStages][kTile][kTile];
  uint32_t sums[kThreads / 32];
};

// A thread copies half a row of a's tile and half a row of b's.
TT_DEVICE void copy_stage(Shared& s, const Params& p, int step) {
  const int row = int(threadIdx.x) / 2, byte = int(threadIdx.x) % 2 * 16, k = step * kTile + byte;
  const int m = int(blockIdx.y) * kTile + row, n = int(blockIdx.x) * kTile + row;
  const bool inside = k < p.K;
  const int8_t* a = inside && m < p.M ? p.a + int64_t(m) * p.K + k : p.a;
  const int8_t* b = inside && n < p.N ? p.b + int64_t(n) * p.K + k : p.b;
  cp_async16(&s.a[step % kStages][row][byte], a, inside && m < p.M ? 16 : 0);
  cp_async16(&s.b[step % kStages][row][byte], b, inside && n < p.N ? 16 : 0);
}

// A warp multiplies 16 rows of a by the 32 of b.
TT_DEVICE void multiply(int32_t (&d)[4][4], const Shared& s, int stage) {
  const int lane = int(threadIdx.x) % 32, row = lane % 8, matrix = lane / 8;
  const int warp = int(threadIdx.x) / 32;
  uint32_t a[4];
  ldmatrix_x4(a, &s.a[stage][16 * warp + matrix % 2 * 8 + row][matrix / 2 * 16]);
  for (int half = 0; half < 2; ++half) {
    uint32_t r[4];
    ldmatrix_x4(r, &s.b[stage][16 * half + matrix / 2 * 8 + row][matrix % 2 * 16]);
    const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
    mma_s8(d[2 * half], a, left);
    mma_s8(d[2 * half + 1], a, right);
  }
}

TT_DEVICE void add_total(Shared& s, uint32_t sum, uint32_t* total) {
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(total, s.sums[0] + s.sums[1]);
}

__global__ void __launch_bounds__(kThreads) product(const __grid_constant__ Params p) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int steps = (p.K + kTile - 1) / kTile;
  int32_t d[4][4] = {};
  copy_stage(s, p, 0);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy_stage(s, p, step + 1);
    cp_async_commit();
    cp_async_wait<1>();
    named_barrier_sync(1, kThreads);  // the stage has come for all
    multiply(d, s, step % kStages);
    named_barrier_sync(2, kThreads);  // all have read it
  }
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    const int m = int(blockIdx.y) * kTile + 16 * warp + lane / 4 + i % 4 / 2 * 8;
    const int n = int(blockIdx.x) * kTile + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (m >= p.M || n >= p.N) continue;
    store_global(p.out + int64_t(m) * p.N + n, d[i / 4][i % 4]);
    sum += uint32_t(d[i / 4][i % 4]);
  }
  add_total(s, sum, p.total);
}

// One misuse each; `out` is [64] int32.
struct MisuseParams {
  int which;
  int32_t* out;
};

TT_DEVICE void misuse_barriers(int which, int thread) {
  if (which == 0 && thread != 5) __syncthreads();  // divergent
  if (which == 1) named_barrier_sync(1, thread < 32 ? 64 : 32);
  if (which == 2) named_barrier_sync(1, 48);
  if (which == 3) named_barrier_sync(16, 64);
  if (which == 4 && thread < 32) named_barrier_sync(1, 64);  // deadlock
  if (which == 5 && thread < 32) named_barrier_arrive(1, 64), named_barrier_arrive(1, 64);
}

TT_DEVICE void misuse_warps(int which, int thread) {
  if (which == 6 && thread % 2 == 0) __syncwarp();
  if (which == 7) {
    if (thread % 2 == 0) {
      __shfl_sync(~0u, thread, 0);
    } else {
      __shfl_sync(~0u, thread, 0);
    }
  }
  if (which == 8 && thread % 2 == 0) __shfl_xor_sync(0x55555555u, thread, 1);
  if (which == 9) __syncwarp(1);
}

TT_DEVICE void misuse_memory(int which, int thread, int32_t* out) {
  if (which == 10 && thread == 63) store_global(out + 64, 1);
  if (which == 11) load16(reinterpret_cast<char*>(out) + 4);
  if (which == 12 && thread == 0) cp_async16(shared_memory() + 1008, out, 16);
  if (which == 13 && thread == 0) store_global(out, 1), load16(out);
  if (which == 14 && thread == 0) shared_memory()[1000] = 1;
  if (which == 15) store_global(reinterpret_cast<int32_t*>(shared_memory()), 1);
}

__global__ void misuse(const __grid_constant__ MisuseParams p) {
  const int thread = int(threadIdx.x);
  misuse_barriers(p.which, thread);
  misuse_warps(p.which, thread);
  misuse_memory(p.which, thread, p.out);
}

}  // namespace
}  // namespace trimtab

extern "C" {

TT_API tt_status simt_product(const int8_t* a, const int8_t* b, int32_t* out, uint32_t* total,
                              int M, int N, int K) {
  using namespace trimtab;
  const Params p = {a, b, out, total, M, N, K};
  const dim3 grid((unsigned(N) + kTile - 1) / kTile, (unsigned(M) + kTile - 1) / kTile);
  return launch("product", product, LaunchShape{grid, dim3(kThreads), int(sizeof(Shared))}, p,
                nullptr);
}

TT_API tt_status simt_misuse(int which, int32_t* out) {
  using namespace trimtab;
  return launch("misuse", misuse, LaunchShape{dim3(1), dim3(64), 1000}, MisuseParams{which, out},
                nullptr);
}
}
