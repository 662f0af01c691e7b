// The instructions that C++ has no word for, one a wrapper. PTX stands in this file and, for sm_90, in
// ptx_sm90.cuh only.
//
// Kernels keep three rules, so that tests/simt can run their source on a CPU and watch it:
//   - shared memory comes from shared_memory() alone (all of it dynamic);
//   - global memory is touched through load_global, load16, store_global, store16, cp_async16, the
//     bulk copies and the atomics alone;
//   - a kernel takes one argument, `const __grid_constant__ Params p`.
// With TT_SIMT defined the same names have host bodies (tests/simt/ptx.h).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#if defined(TT_SIMT)
#include "simt/ptx.h"
#else

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

}  // namespace
}  // namespace trimtab
#endif  // TT_SIMT
