// The instructions of sm_90 and sm_90a: mbarriers, bulk tensor copies, clusters, wgmma. Rules as in ptx.cuh.
#pragma once
#include <cuda.h>

#include "cuda/ptx.cuh"

#if defined(TT_SIMT)
#include "simt/sm90.h"
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
