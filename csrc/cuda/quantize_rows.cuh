// Rows of values to int8, for quantize_int8 and the ops that end in it (NUMERICS.md section 2):
//
//   scale[m] = max_k |y[m,k]| / 127;   q[m,k] = rne(y[m,k] * (127 / absmax))
//
// A source says where y comes from: what a row reads (Raw), the eight values made of it, and what has to
// be known of the whole row first (prepare, which is given the row's first tile). A row is
// taken by a team, a warp or a block, eight adjacent elements a thread at a time (16 bytes of bf16 or
// fp16): chunk c by thread c mod (threads of the team). A tile, kTileChunks chunks a thread, stays in
// registers between finding the maximum and writing the codes, so a row of one tile is read once; a longer
// one is read again, from the L2 cache.
#pragma once
#include <trimtab/trimtab.h>

#include "cuda/float_chunk.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "math/f32x1.h"
#include "math/quantize.h"

namespace trimtab {
namespace {

constexpr int kTileChunks = 4;
constexpr int kWarpRowsThreads = 128;  // a block of four rows where a warp takes one
constexpr int kMaxTeam = 1024;  // threads of a block; a source that needs registers takes fewer
constexpr uint32_t kAllLanes = 0xffffffffu;

template <class Source>
struct QuantizeParams {
  Source source;
  int64_t M, K;
  int64_t columns;  // q is written so far, zeros from K on
  int8_t* q;
  int64_t q_stride;
  float* scale;
  uint32_t* zero;
  int64_t zero_words;
  bool q_wide;  // q and its rows are aligned to 8 bytes
};

// The low bytes of four floats 1.5 * 2^23 + rne(v), |v| < 127.5: there floats are 1 apart, so the sum is
// rounded to an integer, ties to even, and its low byte is the integer in two's complement.
TT_DEVICE uint32_t pack_codes(const float* v, F32x1 inverse) {
  uint32_t bits[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) bits[j] = float_bits((F32x1(v[j]) * inverse + F32x1(12582912.0f)).v);
  return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                     0x5410);
}

template <class Source>
TT_DEVICE void store_codes(const QuantizeParams<Source>& p, int64_t row, int64_t k,
                           const float (&y)[kChunk], float inverse) {
  // A row of zeros, or with NaN or Inf: y * 0 could be NaN, whose low byte is anything.
  const uint32_t low = inverse == 0.0f ? 0 : pack_codes(y, F32x1(inverse));
  const uint32_t high = inverse == 0.0f ? 0 : pack_codes(y + 4, F32x1(inverse));
  int8_t* to = p.q + row * p.q_stride + k;
  if (p.q_wide && k + kChunk <= p.columns) {
    store_global(reinterpret_cast<uint64_t*>(to), uint64_t{high} << 32 | low);
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (k + j < p.columns)
      store_global(to + j, static_cast<int8_t>((j < 4 ? low : high) >> j % 4 * 8));
}

// One tile: chunks first + v * team of the row, v < kTileChunks.
template <bool kWide, class Row, class Raw>
TT_DEVICE void load_tile(const Row& row, int64_t K, int64_t first, int team,
                         Raw (&raw)[kTileChunks]) {
#pragma unroll
  for (int v = 0; v < kTileChunks; ++v)
    row.template load<kWide>((first + v * team) * kChunk, K, raw[v]);
}

template <class Row, class Raw>
TT_DEVICE void tile_values(const Row& row, const Raw (&raw)[kTileChunks],
                           float (&y)[kTileChunks][kChunk]) {
#pragma unroll
  for (int v = 0; v < kTileChunks; ++v) row.values(raw[v], y[v]);
}

TT_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The bits of |y| order as the values do, with NaN on top: a NaN survives the maximum.
TT_DEVICE uint32_t largest_bits(const float (&y)[kTileChunks][kChunk], uint32_t most) {
#pragma unroll
  for (int v = 0; v < kTileChunks; ++v)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) most = larger(most, float_bits(y[v][j]) & 0x7fffffffu);
  return most;
}

TT_DEVICE uint32_t warp_max(uint32_t most) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    most = larger(most, __shfl_xor_sync(kAllLanes, most, lanes));
  return most;
}

// Two sets of a word a warp: rows take turns, so that the barrier of one row also keeps the words of the
// row before from being overwritten too early.
struct QuantizeShared {
  uint32_t most[2][kMaxTeam / 32];
};

// The maximum over the block, in every thread.
TT_DEVICE uint32_t block_max(uint32_t most, int turn) {
  uint32_t* words = reinterpret_cast<QuantizeShared*>(shared_memory())->most[turn];
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  most = warp_max(most);
  if (lane == 0) words[threadIdx.x / 32] = most;
  __syncthreads();
  return warp_max(lane < warps ? words[lane] : 0u);
}

template <class Source>
TT_DEVICE void zero_words(const QuantizeParams<Source>& p) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.zero_words; i += step)
    store_global(p.zero + i, 0u);
}

template <class Source, bool kBlockRow, bool kWide>
__global__ void __launch_bounds__(kBlockRow ? Source::kMaxTeam : kWarpRowsThreads, 1)
    quantize_rows_kernel(const __grid_constant__ QuantizeParams<Source> p) {
  zero_words(p);
  const int team = kBlockRow ? int(blockDim.x) : 32;
  const int teams = kBlockRow ? 1 : kWarpRowsThreads / 32;
  const int me = int(threadIdx.x) % team;
  const int64_t tile = int64_t{team} * kTileChunks;  // chunks
  const int64_t chunks = (p.columns + kChunk - 1) / kChunk;
  int turn = 0;
  for (int64_t m = int64_t{blockIdx.x} * teams + (kBlockRow ? 0 : threadIdx.x / 32); m < p.M;
       m += int64_t{gridDim.x} * teams, turn ^= 1) {
    typename Source::Row row = p.source.row(m);
    typename Source::Raw raw[kTileChunks];
    float y[kTileChunks][kChunk];
    load_tile<kWide>(row, p.K, me, team, raw);
    row.template prepare<kBlockRow, kWide>(p.K, me, team, raw);
    tile_values(row, raw, y);
    uint32_t most = largest_bits(y, 0);
    for (int64_t first = tile; first < chunks; first += tile) {
      load_tile<kWide>(row, p.K, first + me, team, raw);
      tile_values(row, raw, y);
      most = largest_bits(y, most);
    }
    most = kBlockRow ? block_max(most, turn) : warp_max(most);
    const RowScale found = row_scale(float_from_bits(most));
    if (me == 0) store_global(p.scale + m, found.scale);
    for (int64_t first = 0; first < chunks; first += tile) {
      if (chunks > tile) {
        load_tile<kWide>(row, p.K, first + me, team, raw);
        tile_values(row, raw, y);
      }
#pragma unroll
      for (int v = 0; v < kTileChunks; ++v) {
        const int64_t k = (first + me + int64_t{v} * team) * kChunk;
        if (k < p.columns) store_codes(p, m, k, y[v], found.inverse);
      }
    }
  }
}

// One launch. wide: every row the source reads is aligned to 16 bytes.
template <class Source>
tt_status launch_quantize_rows(const char* op, QuantizeParams<Source> p, bool wide,
                               tt_stream stream) {
  if (p.M == 0 && p.zero_words == 0) return TT_OK;
  DeviceFacts facts;
  const tt_status status = device_facts(op, &facts);
  if (status != TT_OK) return status;
  p.q_wide = aligned_rows(p.q, p.q_stride, p.M, 8);
  const int64_t chunks = (p.columns + kChunk - 1) / kChunk;
  const bool block_row = chunks > 32 * kTileChunks;
  int64_t threads = kWarpRowsThreads, blocks = (p.M + 3) / 4;
  if (block_row) {
    // Whole tiles where there are rows to fill the GPU with; else a chunk a thread, for the latency.
    const int64_t each = p.M >= 4 * facts.sm_count ? kTileChunks : 1;
    const int64_t wanted = Source::kWholeTeam ? Source::kMaxTeam : (chunks + each - 1) / each;
    threads = wanted >= Source::kMaxTeam ? Source::kMaxTeam : (wanted + 31) / 32 * 32;
    blocks = p.M;
  }
  constexpr int64_t kMaxBlocks = 1 << 30;  // the loop over rows does the rest
  const int64_t grid = blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks;
  const LaunchShape shape = {dim3(unsigned(grid)), dim3(unsigned(threads)), Source::kSharedBytes};
  if (block_row)
    return wide ? launch(op, quantize_rows_kernel<Source, true, true>, shape, p, stream)
                : launch(op, quantize_rows_kernel<Source, true, false>, shape, p, stream);
  return wide ? launch(op, quantize_rows_kernel<Source, false, true>, shape, p, stream)
              : launch(op, quantize_rows_kernel<Source, false, false>, shape, p, stream);
}

}  // namespace
}  // namespace trimtab
