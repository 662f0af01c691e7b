// int8_mm for up to 16 rows of a: N * K bytes of weight pass once, and their time is the floor.
//
// 4096 x 4096 at 3.35 TB/s is 5 us; hiding 0.7 us of latency takes 2.3 MB on the way, 18 KB a
// multiprocessor. So every warp asks for 4 KB of weight at once, and 16 warps or more are resident.
//
// Roles are swapped: 16 weight rows are the m16 of mma, up to 8 tokens its n8. The sum over K is exact in any
// order, so K is permuted: lane 4 g + t loads bytes 16 t .. + 15 of a 64-byte step in one piece, and feeds
// two words of them to each of two k32 products, of the weight and the tokens alike. No shared memory on the
// way in.
//
// The warps of a block take turns along K and add up in shared memory at the end.
#pragma once
#include "cuda/int8_chunk.cuh"
#include "cuda/int8_epilogue.cuh"

namespace trimtab {

constexpr int kSmallMostM = 16;
constexpr int kSmallStep = 64;  // bytes of K a warp multiplies at once
constexpr int kSmallMostWarps = 16;  // 512 threads of 128 registers fill a multiprocessor

struct Int8MmSmallParams {
  const int8_t* a;  // [M, K], rows a_stride bytes apart; M <= 16
  int64_t a_stride;
  const int8_t* b;  // [N, K], rows b_stride bytes apart
  int64_t b_stride;
  int32_t K;
  EpilogueParams epilogue;
};

namespace {

// A block's weight rows, and the shared memory [warps][8 kTokens][pitch] of its sums.
template <int kRows>
constexpr int kSmallBlockRows = 16 * kRows;
// 4 more: lanes (g, t) write word (2 t pitch + g), and 2 * 4 t + g are 32 different banks.
template <int kRows>
constexpr int kSmallPitch = kSmallBlockRows<kRows> + 4;

constexpr int small_shared_bytes(int rows, int tokens, int warps) {
  return warps * 8 * tokens * (16 * rows + 4) * 4;
}

// The rows a lane reads, clamped into the tensors: what a clamped one adds is not stored.
template <int kRows, int kTokens>
struct SmallRows {
  const int8_t* weight[kRows][2];  // g and g + 8 of each 16
  const int8_t* token[kTokens];
};

template <int kRows, int kTokens>
TT_DEVICE SmallRows<kRows, kTokens> small_rows(const Int8MmSmallParams& p, int g) {
  SmallRows<kRows, kTokens> rows;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = int64_t(blockIdx.x) * kSmallBlockRows<kRows> + 16 * i + 8 * half + g;
      rows.weight[i][half] = p.b + (n < p.epilogue.N ? n : p.epilogue.N - 1) * p.b_stride;
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t m = 8 * i + g;
    rows.token[i] = p.a + (m < p.epilogue.M ? m : p.epilogue.M - 1) * p.a_stride;
  }
  return rows;
}

// sums += over kSteps steps of 64 bytes of K from k on; k counts the lane's own 16 bytes.
// kInside: all are load_chunk_inside's. Their loads stand before the first product, so they are on the way
// together.
template <int kSteps, bool kAligned, bool kInside, int kRows, int kTokens>
TT_DEVICE void small_multiply(const SmallRows<kRows, kTokens>& rows, int k, int K,
                              int32_t (&sums)[kRows][kTokens][4]) {
  Bytes16 weight[kSteps][kRows][2], token[kSteps][kTokens];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int at = k + s * kSmallStep;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      const int8_t* row = rows.weight[i / 2][i % 2];
      weight[s][i / 2][i % 2] =
          kInside ? load_chunk_inside<kAligned>(row, at) : load_chunk<kAligned>(row, at, K);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int8_t* row = rows.token[i];
      if constexpr (kInside && kAligned)  // L1 may keep it: other blocks here read the same tokens
        token[s][i] = load_global(reinterpret_cast<const Bytes16*>(row + at));
      else
        token[s][i] =
            kInside ? load_chunk_inside<kAligned>(row, at) : load_chunk<kAligned>(row, at, K);
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t (&low)[4] = weight[s][r][0].word, (&high)[4] = weight[s][r][1].word;
        const uint32_t a[4] = {low[half], high[half], low[half + 1], high[half + 1]};
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const uint32_t b[2] = {token[s][t].word[half], token[s][t].word[half + 1]};
          mma_s8(sums[r][t], a, b);
        }
      }
    }
  }
}

// Adds the warps' sums and writes the outputs, one a thread: 16 columns are 32 bytes of a row, a sector.
template <int kRows, int kTokens>
TT_DEVICE void small_finish(const EpilogueParams& e, const int32_t* sums, int warps) {
  constexpr int kBlockRows = kSmallBlockRows<kRows>, kPitch = kSmallPitch<kRows>;
  const float inverse = load_inverse(e);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kBlockRows * e.M; i += int(blockDim.x)) {
    const int m = i / kBlockRows, column = i % kBlockRows;
    const int64_t n = int64_t(blockIdx.x) * kBlockRows + column;
    if (n >= e.N) continue;
    uint32_t total = 0;  // wraps, as mma does
    for (int w = 0; w < warps; ++w)
      total += uint32_t(sums[(w * 8 * kTokens + m) * kPitch + column]);
    float t[1] = {epilogue<Activation::none>(
                      F32x1(static_cast<float>(int32_t(total))), F32x1(load_global(e.a_scale + m)),
                      F32x1(load_global(e.b_scale + n)), F32x1(load_bias(e, int(n))))
                      .v};
    activate_all(e.activation, t);
    store_one(e, int64_t(m) * e.out_stride + n, inverse, t[0]);
  }
}

// Grid: a block 16 kRows weight rows. Block: 32 to 512 threads. 8 kTokens >= M.
template <int kRows, int kTokens, bool kAligned>
__global__ void __launch_bounds__(32 * kSmallMostWarps, 1)
    int8_mm_small(const __grid_constant__ Int8MmSmallParams p) {
  constexpr int kSteps = (kAligned ? 4 : 2) / kRows;  // 4 KB of weight a warp, aligned
  constexpr int kPitch = kSmallPitch<kRows>;
  int32_t* shared = reinterpret_cast<int32_t*>(shared_memory());
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warps = int(blockDim.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const SmallRows<kRows, kTokens> rows = small_rows<kRows, kTokens>(p, g);
  int32_t sums[kRows][kTokens][4] = {};

  constexpr int kTurn = kSteps * kSmallStep;
#pragma unroll 1
  for (int k = warp * kTurn; k < p.K; k += warps * kTurn) {
    if (kAligned ? k + kTurn <= p.K : k >= 16 && k + kTurn + 16 <= p.K) {
      small_multiply<kSteps, kAligned, true>(rows, k + 16 * t, p.K, sums);
      continue;
    }
#pragma unroll 1
    for (int rest = k; rest < p.K && rest < k + kTurn; rest += kSmallStep)
      small_multiply<1, kAligned, false>(rows, rest + 16 * t, p.K, sums);
  }

  // sums[r][i]: (row g, token 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        shared[(warp * 8 * kTokens + 8 * i + 2 * t + j % 2) * kPitch + 16 * r + g + j / 2 * 8] =
            sums[r][i][j];
    }
  }
  __syncthreads();
  small_finish<kRows, kTokens>(p.epilogue, shared, warps);
}

}  // namespace
}  // namespace trimtab
