// The wrappers of csrc/cuda/ptx.cuh on the SIMT machine: the same names and contracts. Those of
// ptx_sm90.cuh are in sm90.h.
#pragma once
#include <emmintrin.h>

#include "math/dtypes.h"
#include "simt/core.h"

namespace trimtab {
namespace {

#define TT_DEVICE inline

// 16 bytes in registers.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// --- memory

TT_DEVICE char* shared_memory() { return simt::self().block->shared; }

TT_DEVICE uint32_t shared_address(const void* p) { return simt::shared_address(p); }

template <class T>
TT_DEVICE T load_global(const T* p, SIMT_WHERE) {
  simt::check_aligned(p, alignof(T), "load_global", where);
  simt::check_global(p, sizeof(T), false, where);
  return *p;
}

template <class T>
TT_DEVICE void store_global(T* p, T value, SIMT_WHERE) {
  simt::check_aligned(p, alignof(T), "store_global", where);
  simt::check_global(p, sizeof(T), true, where);
  *p = value;
}

TT_DEVICE Bytes16 load16(const void* p, SIMT_WHERE) {
  simt::check_aligned(p, 16, "load16", where);
  simt::check_global(p, 16, false, where);
  simt::check_constant(p, 16, where);
  Bytes16 v;
  std::memcpy(&v, p, 16);
  return v;
}

TT_DEVICE void store16(void* p, Bytes16 v, SIMT_WHERE) {
  simt::check_aligned(p, 16, "store16", where);
  simt::check_global(p, 16, true, where);
  std::memcpy(p, &v, 16);
}

// --- sm_80: copies beside the computation

TT_DEVICE void perform(const simt::AsyncCopy& copy) {
  std::memset(copy.to, 0, 16);
  if (copy.bytes != 0) std::memcpy(copy.to, copy.from, size_t(copy.bytes));
}

// The copies that pass keep() stay, in their order; the others are done, in any order.
template <class Keep>
void perform_copies(simt::Thread& t, const Keep& keep) {
  const auto first = std::stable_partition(t.copies.begin(), t.copies.end(), keep);
  for (auto i = first; i != t.copies.end(); ++i) perform(*i);
  t.copies.erase(first, t.copies.end());
}

TT_DEVICE void cp_async16(void* shared, const void* p, int bytes, SIMT_WHERE) {
  if (bytes < 0 || bytes > 16) simt::fault(where, "cp_async16 of %d bytes", bytes);
  simt::check_shared(shared, 16, where);
  simt::check_aligned(shared, 16, "cp_async16 to shared memory", where);
  simt::check_aligned(p, 16, "cp_async16 from global memory", where);
  if (bytes != 0) simt::check_global(p, size_t(bytes), false, where);
  simt::Thread& me = simt::self();
  const simt::AsyncCopy copy = {shared, p, bytes, me.groups};
  const bool at_once = simt::machine.when == simt::Policy::early ||
                       (simt::machine.when == simt::Policy::random && simt::one_in(2));
  if (at_once) return perform(copy);
  me.copies.push_back(copy);
}

TT_DEVICE void cp_async_commit() {
  simt::Thread& me = simt::self();
  ++me.groups;
  if (simt::machine.when == simt::Policy::random)
    perform_copies(me, [](const simt::AsyncCopy&) { return simt::one_in(2); });
  simt::maybe_yield();
}

template <int kPending>
TT_DEVICE void cp_async_wait() {
  simt::Thread& me = simt::self();
  const int64_t open = me.groups - kPending;
  perform_copies(me, [=](const simt::AsyncCopy& copy) { return copy.group >= open; });
  simt::maybe_yield();
}

// --- sm_80: rounding

TT_DEVICE uint32_t round_bf16x2(float low, float high) {
  const auto one = [](float x) { return x != x ? uint32_t{0x7fff} : uint32_t{to_bf16(x).bits}; };
  return one(low) | one(high) << 16;
}

TT_DEVICE uint32_t round_fp16x2(float low, float high) {
  const auto one = [](float x) { return x != x ? uint32_t{0x7fff} : uint32_t{to_fp16(x).bits}; };
  return one(low) | one(high) << 16;
}

// --- sm_80: matrix fragments, the matrix product

TT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, SIMT_WHERE) {
  simt::check_shared(shared_row, 16, where);
  simt::check_aligned(shared_row, 16, "ldmatrix_x4", where);
  struct Operand {
    const char* row;
    uint32_t* r;
  } mine = {static_cast<const char*>(shared_row), r};
  const auto execute = [](simt::Operands<Operand> lane) {
    for (int i = 0; i < 4; ++i)
      for (int row = 0; row < 8; ++row)
        for (int part = 0; part < 4; ++part)
          std::memcpy(&lane[4 * row + part]->r[i], lane[8 * i + row]->row + 4 * part, 4);
  };
  simt::meet_warp(~0u, mine, execute, "ldmatrix_x4", where);
}

TT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, SIMT_WHERE) {
  simt::check_shared(shared_row, 16, where);
  simt::check_aligned(shared_row, 16, "ldmatrix_x4_trans", where);
  struct Operand {
    const char* row;
    uint32_t* r;
  } mine = {static_cast<const char*>(shared_row), r};
  const auto execute = [](simt::Operands<Operand> lane) {
    for (int i = 0; i < 4; ++i)
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 8; ++column) {
          char* to = reinterpret_cast<char*>(&lane[4 * column + row / 2]->r[i]);
          std::memcpy(to + row % 2 * 2, lane[8 * i + row]->row + 2 * column, 2);
        }
  };
  simt::meet_warp(~0u, mine, execute, "ldmatrix_x4_trans", where);
}

// 16 int8 to two times 8 int16.
TT_DEVICE void widen(__m128i (&to)[2], const int8_t* from) {
  const __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
  to[0] = _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8);
  to[1] = _mm_srai_epi16(_mm_unpackhi_epi8(x, x), 8);
}

// d[i][j] += a[i] b[j]^T over 32 bytes. pmaddwd adds the products of two int16: -128 * -128 * 2 has room.
TT_DEVICE void product_16x8x32(int32_t (&d)[16][8], const int8_t (&a)[16][32],
                               const int8_t (&b)[8][32]) {
  __m128i column[8][2][2];
  for (int j = 0; j < 8; ++j)
    for (int half = 0; half < 2; ++half) widen(column[j][half], &b[j][16 * half]);
  for (int i = 0; i < 16; ++i) {
    __m128i row[2][2];
    for (int half = 0; half < 2; ++half) widen(row[half], &a[i][16 * half]);
    for (int j = 0; j < 8; j += 4) {
      __m128i sum[4];  // four parts of each of four columns
      for (int c = 0; c < 4; ++c) {
        const __m128i(&y)[2][2] = column[j + c];
        sum[c] = _mm_add_epi32(
            _mm_add_epi32(_mm_madd_epi16(row[0][0], y[0][0]), _mm_madd_epi16(row[0][1], y[0][1])),
            _mm_add_epi32(_mm_madd_epi16(row[1][0], y[1][0]), _mm_madd_epi16(row[1][1], y[1][1])));
      }
      const __m128i low =
          _mm_add_epi32(_mm_unpacklo_epi32(sum[0], sum[1]), _mm_unpackhi_epi32(sum[0], sum[1]));
      const __m128i high =
          _mm_add_epi32(_mm_unpacklo_epi32(sum[2], sum[3]), _mm_unpackhi_epi32(sum[2], sum[3]));
      const __m128i all =
          _mm_add_epi32(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
      __m128i* to = reinterpret_cast<__m128i*>(&d[i][j]);
      _mm_store_si128(to, _mm_add_epi32(_mm_load_si128(to), all));
    }
  }
}

TT_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
  struct Operand {
    int32_t* d;
    const uint32_t *a, *b;
  } mine = {d, a, b};
  const auto execute = [](simt::Operands<Operand> lane) {
    alignas(16) int8_t A[16][32], B[8][32];
    alignas(16) int32_t D[16][8];
    for (unsigned g = 0; g < 8; ++g)
      for (unsigned t = 0; t < 4; ++t) {
        const Operand& x = *lane[4 * g + t];
        std::memcpy(&A[g][4 * t], &x.a[0], 4), std::memcpy(&A[g + 8][4 * t], &x.a[1], 4);
        std::memcpy(&A[g][4 * t + 16], &x.a[2], 4), std::memcpy(&A[g + 8][4 * t + 16], &x.a[3], 4);
        std::memcpy(&B[g][4 * t], &x.b[0], 4), std::memcpy(&B[g][4 * t + 16], &x.b[1], 4);
        std::memcpy(&D[g][2 * t], &x.d[0], 8), std::memcpy(&D[g + 8][2 * t], &x.d[2], 8);
      }
    product_16x8x32(D, A, B);
    for (unsigned g = 0; g < 8; ++g)
      for (unsigned t = 0; t < 4; ++t) {
        const Operand& x = *lane[4 * g + t];
        std::memcpy(&x.d[0], &D[g][2 * t], 8), std::memcpy(&x.d[2], &D[g + 8][2 * t], 8);
      }
  };
  simt::meet_warp(~0u, mine, execute, "mma_s8", where);
}

// The order of a sum is the seed's, the same in all launches, as a device has one of its own.
template <class T>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* name,
            const simt::Where& where) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } mine = {d, a, b};
  const auto execute = [](simt::Operands<Operand> lane) {
    const auto element = [](const uint32_t* r, int first, int step, int k) {  // k of a lane's row
      return to_float(T{static_cast<uint16_t>(r[first + step * (k / 8)] >> k % 2 * 16)});
    };
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float& sum = lane[unsigned(4 * (row % 8) + column / 2)]->d[2 * (row / 8) + column % 2];
        for (int i = 0; i < 16; ++i) {
          const int k = i ^ int(simt::machine.seed % 16), t = k % 8 / 2;
          const float x = element(lane[unsigned(4 * (row % 8) + t)]->a, row / 8, 2, k);
          sum += x * element(lane[unsigned(4 * column + t)]->b, 0, 1, k);
        }
      }
  };
  simt::meet_warp(~0u, mine, execute, name, where);
}

TT_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
  mma_16<bf16>(d, a, b, "mma_bf16", where);
}

TT_DEVICE void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
  mma_16<fp16>(d, a, b, "mma_fp16", where);
}

TT_DEVICE void named_barrier_sync(int id, int threads, SIMT_WHERE) {
  simt::check_named_barrier(id, where);
  simt::join_barrier(id, threads, true, "named_barrier_sync", where);
}

TT_DEVICE void named_barrier_arrive(int id, int threads, SIMT_WHERE) {
  simt::check_named_barrier(id, where);
  simt::join_barrier(id, threads, false, "named_barrier_arrive", where);
}

}  // namespace
}  // namespace trimtab

#include "simt/mma_sparse.h"
