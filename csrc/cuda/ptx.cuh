// The instructions that C++ has no word for, one a wrapper. PTX stands in this file only.
//
// Kernels keep three rules, so that tests/simt can run their source on a CPU and watch it:
//   - shared memory comes from shared_memory() alone (all of it dynamic);
//   - global memory is touched through load_global, load16, store_global, store16, cp_async16, the
//     bulk copies and the atomics alone;
//   - a kernel takes one argument, `const __grid_constant__ Params p`.
// With TT_SIMT defined the same names have host bodies (tests/simt/ptx.h).
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(TT_SIMT)
#include "simt/ptx.h"
#else

// The asm of sm_90 and sm_90a is left out where the target lacks it; the launcher never goes there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TT_SM90 1
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TT_SM90A 1
#endif

namespace trimtab {
namespace {

#define TT_DEVICE __device__ __forceinline__

// 16 bytes in registers.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// --- memory

// The block's dynamic shared memory, aligned to 1024 bytes.
TT_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char tt_shared[];
  return tt_shared;
}

// The 32-bit address of shared memory that PTX takes.
TT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class T>
TT_DEVICE T load_global(const T* p) {
  return *p;
}

template <class T>
TT_DEVICE void store_global(T* p, T value) {
  *p = value;
}

// 16 bytes that no one writes during the kernel; p aligned to 16.
TT_DEVICE Bytes16 load16(const void* p) {
  Bytes16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

// 16 bytes to p, aligned to 16.
TT_DEVICE void store16(void* p, Bytes16 v) { *static_cast<Bytes16*>(p) = v; }

// --- sm_80: two floats rounded to nearest even, `low` to the lower half. A NaN becomes 0x7fff, which is not
// the NaN of math/dtypes.h.

TT_DEVICE uint32_t round_bf16x2(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

TT_DEVICE uint32_t round_fp16x2(float low, float high) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// --- sm_80: copies beside the computation, matrix fragments, the matrix product

// Copies 16 bytes to shared memory without waiting: the first `bytes` (0 to 16) from p, then zeros. Both
// aligned to 16; p is not read where bytes is 0. It lands by the cp_async_wait that covers its group.
TT_DEVICE void cp_async16(void* shared, const void* p, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(p), "r"(bytes)
      : "memory");
}

// Ends a group: this thread's copies since the last one.
TT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are on the way.
template <int kPending>
TT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 16-byte matrices: lane 8 i + r points to row r of matrix i; register i of lane l gets bytes
// 4 (l % 4) .. + 3 of row l / 4 of matrix i.
TT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, each transposed: rows as in ldmatrix_x4; register i of lane 4 g + t
// gets column g of rows 2 t (the lower half) and 2 t + 1 of matrix i.
TT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d[16 x 8] += a[16 x 32] b[8 x 32]^T in int8 with int32 sums, over a warp. Lane l = 4 g + t holds
//   a[0..3]: bytes 4t.. of row g; of row g + 8; bytes 16 + 4t.. of row g; of row g + 8
//   b[0..1]: bytes 4t.. and 16 + 4t.. of row g of b
//   d[0..3]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
TT_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16 x 8] += a[16 x 16] b[8 x 16]^T in bf16 or fp16 with fp32 sums, over a warp; products are exact, the sums
// keep no fixed order. Lane l = 4 g + t holds, the lower k in the lower half,
//   a[0..3]: k 2t, 2t + 1 of row g; of row g + 8; k 2t + 8, 2t + 9 of row g; of row g + 8
//   b[0..1]: k 2t, 2t + 1 and 2t + 8, 2t + 9 of row g of b
//   d[0..3]: as mma_s8
#define TT_MMA_16(name, type)                                                           \
  TT_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
TT_MMA_16(mma_bf16, "bf16")
TT_MMA_16(mma_fp16, "f16")

// d[16 x 8] += a[16 x 32] b[8 x 32]^T where a keeps two of every four adjacent elements of a row: a warp hands
// over the kept ones as mma_bf16's a [16 x 16], and their positions, four bits a group of four (the lower
// position in the lower two bits). Lane l = 4 g + t holds
//   b[0..3]: k 2t, 2t + 1 of row g of b, plus 0, 8, 16 and 24
//   e, where t / 2 = kSelect: groups of columns 16 (t % 2) .. + 15; of row g, above them those of row g + 8
//   d[0..3]: as mma_s8
// "ordered": the lower position comes first, else the result is undefined. Sources of this layout and the next:
// csrc/include/trimtab/sparse24_linear.h.
#define TT_MMA_SP_16(name, type)                                                                   \
  template <int kSelect>                                                                           \
  TT_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) { \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
                 "%12, %13;"                                                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                   "r"(b[3]), "r"(e), "n"(kSelect));                                               \
  }
TT_MMA_SP_16(mma_sp_bf16, "bf16")
TT_MMA_SP_16(mma_sp_fp16, "f16")

// The same in int8 with int32 sums, d[16 x 8] += a[16 x 64] b[8 x 64]^T: the kept ones are mma_s8's a
// [16 x 32];
//   b[0..3]: bytes 4t.. of row g of b, plus 0, 16, 32 and 48
//   e: of row g + 8 (t % 2), the groups of columns 32 (t / 2) .. + 31
TT_DEVICE void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t e) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(e));
}

// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, a multiple of 32.
TT_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same barrier, passed without waiting.
TT_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- sm_90: mbarriers. One 64-bit word in shared memory; a phase ends when `count` arrivals and all
// expected bytes have come. Waiters name the parity (0, 1, 0, ...) of the phase they wait for.

TT_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Makes the initialisation visible to the copy engine and the cluster; then a barrier.
TT_DEVICE void fence_mbarrier_init() {
#if defined(TT_SM90)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

TT_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at the barrier at the same address in block `rank` of the cluster. It orders nothing for the other
// block: for saying that this thread's wgmma are done with a stage.
TT_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
#if defined(TT_SM90)
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// The same, and what was read and written before it stays before it for the whole cluster (a fence, which costs
// several hundred cycles).
TT_DEVICE void mbarrier_release_cluster(uint64_t* barrier, uint32_t rank) {
#if defined(TT_SM90)
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Arrives and adds `bytes` to what the phase waits for.
TT_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
#if defined(TT_SM90)
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Waits until the phase of that parity has ended.
TT_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(TT_SM90)
  asm volatile(
      "{\n .reg .pred done;\n again:\n"
      " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// The same, and what came before the mbarrier_release_cluster of other blocks is seen.
TT_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
#if defined(TT_SM90)
  asm volatile(
      "{\n .reg .pred done;\n again:\n"
      " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// --- sm_90: bulk tensor copies. A tensor map describes a 2-D tensor in global memory; x counts along
// the adjacent elements. What lies outside the tensor reads as zero and is not written.

TT_DEVICE void tensor_map_prefetch(const CUtensorMap* map) {
#if defined(TT_SM90)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// One box to shared memory (aligned to 1024 bytes with the 128-byte swizzle); its bytes count towards
// the barrier's phase.
TT_DEVICE void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
#if defined(TT_SM90)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
#endif
}

// The same box to the same address in every block of the cluster whose bit is set in `blocks`, and its
// bytes to the barrier at the same address there.
TT_DEVICE void tma_load_multicast(void* shared, const CUtensorMap* map, int x, int y,
                                  uint64_t* barrier, uint16_t blocks) {
#if defined(TT_SM90)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
#endif
}

// One box from shared memory to the tensor, in this thread's open store group.
TT_DEVICE void tma_store(const CUtensorMap* map, const void* shared, int x, int y) {
#if defined(TT_SM90)
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(x), "r"(y), "r"(shared_address(shared))
      : "memory");
#endif
}

TT_DEVICE void tma_store_commit() {
#if defined(TT_SM90)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's store groups have still to read shared memory.
template <int kPending>
TT_DEVICE void tma_store_wait_read() {
#if defined(TT_SM90)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Makes this thread's ordinary writes to shared memory visible to wgmma and the bulk copies; then a
// barrier.
TT_DEVICE void fence_proxy_async() {
#if defined(TT_SM90)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// --- sm_90: clusters

TT_DEVICE uint32_t cluster_rank() {
  uint32_t rank = 0;
#if defined(TT_SM90)
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// The word at the same address in block `rank` of the cluster.
TT_DEVICE uint32_t load_shared_cluster(const uint32_t* shared, uint32_t rank) {
  uint32_t word = 0;
#if defined(TT_SM90)
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %1, %2;\n"
      " ld.shared::cluster.u32 %0, [remote];\n}"
      : "=r"(word)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
#endif
  return word;
}

// A barrier of all threads of the cluster: that they have come, no more. It does not order ordinary memory (that
// fence costs several hundred cycles); mbarriers are seen after fence_mbarrier_init and this.
TT_DEVICE void cluster_sync() {
#if defined(TT_SM90)
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// --- sm_90a: wgmma. A warpgroup (four warps, the first one's index divisible by 4) multiplies tiles in
// shared memory beside its other work.

// Orders this warpgroup's register accesses before its next wgmma.
TT_DEVICE void wgmma_fence() {
#if defined(TT_SM90A)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

TT_DEVICE void wgmma_commit() {
#if defined(TT_SM90A)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most kPending of the newest groups are unfinished. The sums of a group may be touched
// only after the wait that covers it.
template <int kPending>
TT_DEVICE void wgmma_wait() {
#if defined(TT_SM90A)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving uses of the sums across this point; no instruction.
template <int kCount>
TT_DEVICE void wgmma_pin(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

template <int kCount>
TT_DEVICE void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What wgmma reads: rows of 128 bytes, K adjacent, in the 128-byte swizzle (bytes 16 c .. of row r lie at
// chunk c ^ (r % 8)), eight rows to 1024 bytes. `shared` may be advanced by 32 bytes a step of K within
// the 128.
//   bits 0-13 address / 16, 16-29 leading offset (unused here), 32-45 stride of eight rows / 16,
//   62-63 swizzle, 1 = 128 bytes
TT_DEVICE uint64_t wgmma_descriptor(const void* shared) {
  const uint64_t address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same for rows of 64 bytes in the 64-byte swizzle: chunk c ^ (r / 2 % 4), eight rows to 512 bytes.
TT_DEVICE uint64_t wgmma_descriptor64(const void* shared) {
  const uint64_t address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
}

// The operands of 16 sums, and their numbers in the text.
#define TT_SUM_4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define TT_SUM_16(d, i) TT_SUM_4(d, i), TT_SUM_4(d, i + 4), TT_SUM_4(d, i + 8), TT_SUM_4(d, i + 12)
#define TT_SUMS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TT_SUMS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TT_SUMS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TT_SUMS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TT_SUMS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TT_SUMS_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TT_SUMS_6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define TT_SUMS_7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TT_WGMMA(n, sums, a, b, add)        \
  "{\n .reg .pred p;\n setp.ne.b32 p, " add \
  ", 0;\n"                                  \
  " wgmma.mma_async.sync.aligned.m64n" n "k32.s32.s8.s8 {" sums "}, " a ", " b ", p;\n}"

// d[64 x N] (+)= a[64 x 32] b[N x 32]^T in int8, int32 sums, N = 32, 64, 128, 192
// or 256: half as many sums a thread. Without `add`, d starts at 0.
// Thread 32 w + 4 g + t of the warpgroup holds, for i < N / 8:
//   d[4 i .. 4 i + 3]: (16 w + g, 8 i + 2 t), (.., + 1), (16 w + g + 8, 8 i + 2 t), (.., + 1)
TT_DEVICE void wgmma_s8(int32_t (&d)[16], uint64_t a, uint64_t b, bool add) {
#if defined(TT_SM90A)
  asm volatile(TT_WGMMA("32", TT_SUMS_0, "%16", "%17", "%18")
               : TT_SUM_16(d, 0)
               : "l"(a), "l"(b), "r"(int(add)));
#endif
}
TT_DEVICE void wgmma_s8(int32_t (&d)[32], uint64_t a, uint64_t b, bool add) {
#if defined(TT_SM90A)
  asm volatile(TT_WGMMA("64", TT_SUMS_0 ", " TT_SUMS_1, "%32", "%33", "%34")
               : TT_SUM_16(d, 0), TT_SUM_16(d, 16)
               : "l"(a), "l"(b), "r"(int(add)));
#endif
}
TT_DEVICE void wgmma_s8(int32_t (&d)[64], uint64_t a, uint64_t b, bool add) {
#if defined(TT_SM90A)
  asm volatile(
      TT_WGMMA("128", TT_SUMS_0 ", " TT_SUMS_1 ", " TT_SUMS_2 ", " TT_SUMS_3, "%64", "%65", "%66")
      : TT_SUM_16(d, 0), TT_SUM_16(d, 16), TT_SUM_16(d, 32), TT_SUM_16(d, 48)
      : "l"(a), "l"(b), "r"(int(add)));
#endif
}
TT_DEVICE void wgmma_s8(int32_t (&d)[96], uint64_t a, uint64_t b, bool add) {
#if defined(TT_SM90A)
  asm volatile(
      TT_WGMMA("192",
               TT_SUMS_0 ", " TT_SUMS_1 ", " TT_SUMS_2 ", " TT_SUMS_3 ", " TT_SUMS_4 ", " TT_SUMS_5,
               "%96", "%97", "%98")
      : TT_SUM_16(d, 0), TT_SUM_16(d, 16), TT_SUM_16(d, 32), TT_SUM_16(d, 48), TT_SUM_16(d, 64),
        TT_SUM_16(d, 80)
      : "l"(a), "l"(b), "r"(int(add)));
#endif
}
TT_DEVICE void wgmma_s8(int32_t (&d)[128], uint64_t a, uint64_t b, bool add) {
#if defined(TT_SM90A)
  asm volatile(TT_WGMMA("256",
                        TT_SUMS_0 ", " TT_SUMS_1 ", " TT_SUMS_2 ", " TT_SUMS_3 ", " TT_SUMS_4
                                  ", " TT_SUMS_5 ", " TT_SUMS_6 ", " TT_SUMS_7,
                        "%128", "%129", "%130")
               : TT_SUM_16(d, 0), TT_SUM_16(d, 16), TT_SUM_16(d, 32), TT_SUM_16(d, 48),
                 TT_SUM_16(d, 64), TT_SUM_16(d, 80), TT_SUM_16(d, 96), TT_SUM_16(d, 112)
               : "l"(a), "l"(b), "r"(int(add)));
#endif
}

// d[64 x N] (+)= a[64 x 64] b[N x 64]^T in int8, or of k 32 in bf16 and fp16 with fp32 sums, where a keeps two of
// every four adjacent elements of a row: `a` names 32 bytes a row of kept ones (wgmma_descriptor64), b 64
// bytes. N = 64, 128 or 256. Warp w of the warpgroup hands over the metadata of rows 16 w .. 16 w + 15 as
// mma.sp does; kSelect as there. e must stand until the wait, as the sums must.
#if defined(TT_SM90A)
#define TT_SM90A_ASM(...) asm volatile(__VA_ARGS__)
#else
#define TT_SM90A_ASM(...) static_cast<void>(0)
#endif
#define TT_FLOAT_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TT_FLOAT_16(d, i) \
  TT_FLOAT_4(d, i), TT_FLOAT_4(d, i + 4), TT_FLOAT_4(d, i + 8), TT_FLOAT_4(d, i + 12)
#define TT_SUMS_64 TT_SUMS_0 ", " TT_SUMS_1
#define TT_SUMS_128 TT_SUMS_64 ", " TT_SUMS_2 ", " TT_SUMS_3
#define TT_SUMS_256 TT_SUMS_128 ", " TT_SUMS_4 ", " TT_SUMS_5 ", " TT_SUMS_6 ", " TT_SUMS_7
#define TT_WGMMA_SP(shape, sums, a, b, e, add, select) \
  "{\n .reg .pred p;\n setp.ne.b32 p, " add            \
  ", 0;\n"                                             \
  " wgmma.mma_async.sp.sync.aligned." shape " {" sums "}, " a ", " b ", " e ", " select ", p"
#define TT_WGMMA_SP_16(name, type)                                                                 \
  template <int kSelect>                                                                           \
  TT_DEVICE void name(float (&d)[32], uint64_t a, uint64_t b, uint32_t e, bool add) {              \
    TT_SM90A_ASM(TT_WGMMA_SP("m64n64k32.f32." type "." type, TT_SUMS_64, "%32", "%33", "%34",      \
                             "%35", "%36") ", 1, 1, 0, 0;\n}" : TT_FLOAT_16(d, 0),                 \
                 TT_FLOAT_16(d, 16) : "l"(a), "l"(b), "r"(e), "r"(int(add)), "n"(kSelect));        \
  }                                                                                                \
  template <int kSelect>                                                                           \
  TT_DEVICE void name(float (&d)[64], uint64_t a, uint64_t b, uint32_t e, bool add) {              \
    TT_SM90A_ASM(TT_WGMMA_SP("m64n128k32.f32." type "." type, TT_SUMS_128, "%64", "%65", "%66",    \
                             "%67", "%68") ", 1, 1, 0, 0;\n}" : TT_FLOAT_16(d, 0),                 \
                 TT_FLOAT_16(d, 16), TT_FLOAT_16(d, 32), TT_FLOAT_16(d, 48) : "l"(a), "l"(b),      \
                 "r"(e), "r"(int(add)), "n"(kSelect));                                             \
  }                                                                                                \
  template <int kSelect>                                                                           \
  TT_DEVICE void name(float (&d)[128], uint64_t a, uint64_t b, uint32_t e, bool add) {             \
    TT_SM90A_ASM(TT_WGMMA_SP("m64n256k32.f32." type "." type, TT_SUMS_256, "%128", "%129", "%130", \
                             "%131", "%132") ", 1, 1, 0, 0;\n}" : TT_FLOAT_16(d, 0),               \
                 TT_FLOAT_16(d, 16), TT_FLOAT_16(d, 32), TT_FLOAT_16(d, 48), TT_FLOAT_16(d, 64),   \
                 TT_FLOAT_16(d, 80), TT_FLOAT_16(d, 96), TT_FLOAT_16(d, 112) : "l"(a), "l"(b),     \
                 "r"(e), "r"(int(add)), "n"(kSelect));                                             \
  }
TT_WGMMA_SP_16(wgmma_sp_bf16, "bf16")
TT_WGMMA_SP_16(wgmma_sp_fp16, "f16")
TT_DEVICE void wgmma_sp_s8(int32_t (&d)[32], uint64_t a, uint64_t b, uint32_t e, bool add) {
  TT_SM90A_ASM(TT_WGMMA_SP("m64n64k64.s32.s8.s8", TT_SUMS_64, "%32", "%33", "%34", "%35",
                           "0") ";\n}" : TT_SUM_16(d, 0),
               TT_SUM_16(d, 16) : "l"(a), "l"(b), "r"(e), "r"(int(add)));
}
TT_DEVICE void wgmma_sp_s8(int32_t (&d)[64], uint64_t a, uint64_t b, uint32_t e, bool add) {
  TT_SM90A_ASM(TT_WGMMA_SP("m64n128k64.s32.s8.s8", TT_SUMS_128, "%64", "%65", "%66", "%67",
                           "0") ";\n}" : TT_SUM_16(d, 0),
               TT_SUM_16(d, 16), TT_SUM_16(d, 32), TT_SUM_16(d, 48) : "l"(a), "l"(b), "r"(e),
               "r"(int(add)));
}
TT_DEVICE void wgmma_sp_s8(int32_t (&d)[128], uint64_t a, uint64_t b, uint32_t e, bool add) {
  TT_SM90A_ASM(TT_WGMMA_SP("m64n256k64.s32.s8.s8", TT_SUMS_256, "%128", "%129", "%130", "%131",
                           "0") ";\n}" : TT_SUM_16(d, 0),
               TT_SUM_16(d, 16), TT_SUM_16(d, 32), TT_SUM_16(d, 48), TT_SUM_16(d, 64),
               TT_SUM_16(d, 80), TT_SUM_16(d, 96), TT_SUM_16(d, 112) : "l"(a), "l"(b), "r"(e),
               "r"(int(add)));
}

// Gives registers back, or takes them: a whole warpgroup at once, kCount a thread, a multiple of 8.
template <int kCount>
TT_DEVICE void setmaxnreg_dec() {
#if defined(TT_SM90A)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
TT_DEVICE void setmaxnreg_inc() {
#if defined(TT_SM90A)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace
}  // namespace trimtab
#endif  // TT_SIMT
