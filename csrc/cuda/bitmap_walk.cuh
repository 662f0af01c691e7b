// How bitmap_linear's kernel (bitmap_mm.cuh) walks a bitmap weight: its parameters and the layout of its shared
// memory, and turn by turn what the bits say of the values and those values on their way to shared memory.
#pragma once
#include <trimtab/bitmap_linear.h>

#include <type_traits>

#include "cuda/int8_epilogue.cuh"

namespace trimtab {

struct BitmapParams {
  const void*
      x;  // [M, K], rows x_stride elements apart; for int8 values the codes, whole 16 bytes a row
  int64_t x_stride;
  const char* values;  // aligned to 16
  int64_t count;  // of values
  const uint64_t* bits;  // [N, words]
  const int64_t* row_start;  // [N + 1]
  int32_t K, words;  // words of a row: ceil(K / 64)
  int32_t share;  // words of a row that are a warp's: whole turns
  bool wide;  // rows of x are aligned to 16 bytes
  EpilogueParams epilogue;
};

// kTiles: tiles of 16 weight rows a block;  kTokens: tiles of 8 rows of x
template <class T_, int kTiles_, int kTokens_>
struct BitmapConfig {
  using T = T_;
  using Sum = typename std::conditional<sizeof(T) == 1, int32_t, float>::type;
  static constexpr int kTiles = kTiles_, kTokens = kTokens_, kRows = 16 * kTiles;
  static constexpr int kWarps = kTiles == 1 ? 8 : 16;  // at most
  static constexpr int kBlocks = kTiles == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;  // on a multiprocessor
  static constexpr int kWords = (sizeof(T) == 4 ? 2 : 4) / kTiles;  // of a row in a turn
  static constexpr int kLaneWords = kRows * kWords / 32;
  static constexpr int kRowLanes = kWords / kLaneWords;  // that load a row's bits
  // A row's values of a turn if all are kept, and what lies before them in their first 16 bytes. Rows begin
  // four banks apart.
  static constexpr int kRowBytes = kWords * 64 * int(sizeof(T)) + 16;
  static constexpr int kBitsAt = kRows * kRowBytes;  // uint64 [kRows][kWords]
  static constexpr int kStartAt = kBitsAt + kRows * kWords * 8;  // int32 [kRows][kWords]
  static constexpr int kFromAt = kStartAt + kRows * kWords * 4;  // int64 [kRows]
  static constexpr int kChunksAt = kFromAt + kRows * 8;  // int32 [kRows]
  static constexpr int kWarpBytes = kChunksAt + kRows * 4;
  // Then, for the block: int32 [warps][kRows] counts, and the table of expand_bytes.
  static constexpr int kWarpShared = kWarpBytes + kRows * 4, kTableBytes = 64;
  // 4 more: lanes (g, t) write word 2 t pitch + g, 32 different banks.
  static constexpr int kPitch = kRows + 4;

  static_assert(kRowBytes % 128 == 16 && kWarpBytes % 16 == 0, "see above");
  static_assert(kRowLanes >= 1 && 32 % kRowLanes == 0, "every lane loads words of one row");
  static_assert(8 * kTokens * kPitch * 4 <= kWarpBytes, "the sums fit where the values were");
};

namespace {

// A warp's place: its shared memory, its rows, its words of each, and what is kept before them of the row
// whose bits this lane loads.
template <class C>
struct BitmapWarp {
  char* shared;
  int lane, first_row;
  int begin, end;
  int64_t position;

  TT_DEVICE int row() const { return lane / C::kRowLanes; }
  TT_DEVICE uint64_t* bits() const { return reinterpret_cast<uint64_t*>(shared + C::kBitsAt); }
  TT_DEVICE int* start() const { return reinterpret_cast<int*>(shared + C::kStartAt); }
  TT_DEVICE int64_t* from() const { return reinterpret_cast<int64_t*>(shared + C::kFromAt); }
  TT_DEVICE int* chunks() const { return reinterpret_cast<int*>(shared + C::kChunksAt); }
};

TT_DEVICE int popcount64(uint64_t bits) {
  return __popc(uint32_t(bits)) + __popc(uint32_t(bits >> 32));
}

// This lane's words of the turn that begins with `word`; zeros beyond the warp's share and the last row.
template <class C>
TT_DEVICE void load_bits(const BitmapParams& p, const BitmapWarp<C>& warp, int word,
                         uint64_t (&bits)[C::kLaneWords]) {
  const int64_t n = int64_t(warp.first_row) + warp.row();
  const int first = word + warp.lane % C::kRowLanes * C::kLaneWords;
#pragma unroll
  for (int i = 0; i < C::kLaneWords; ++i)
    bits[i] = n < p.epilogue.N && first + i < warp.end
                  ? load_global(p.bits + n * p.words + first + i)
                  : 0;
}

// The sum over the lanes of a row.
template <class C>
TT_DEVICE int row_sum(int mine) {
  if constexpr (C::kRowLanes == 2) mine += __shfl_xor_sync(~0u, mine, 1);
  static_assert(C::kRowLanes <= 2, "one exchange is enough");
  return mine;
}

// Where the warp's values begin, from what all warps of the block count. Never outside [0, count], whatever
// row_start says.
template <class C>
TT_DEVICE int64_t first_position(const BitmapParams& p, const BitmapWarp<C>& warp, int* counts) {
  int mine = 0;
#pragma unroll 2
  for (int word = warp.begin; word < warp.end; word += C::kWords) {
    uint64_t bits[C::kLaneWords];
    load_bits(p, warp, word, bits);
#pragma unroll
    for (int i = 0; i < C::kLaneWords; ++i) mine += popcount64(bits[i]);
  }
  const int own = int(threadIdx.x) / 32;
  counts[own * C::kRows + warp.row()] = row_sum<C>(mine);
  __syncthreads();
  const int64_t n = int64_t(warp.first_row) + warp.row();
  if (n >= p.epilogue.N) return 0;
  int64_t position = load_global(p.row_start + n);
  position = position < 0 ? 0 : position < p.count ? position : p.count;
#pragma unroll 1
  for (int i = 0; i < own; ++i) position += counts[i * C::kRows + warp.row()];
  return position;
}

// The turn's bits, where each row's values are in memory and each word's in shared memory; position moves on.
template <class C>
TT_DEVICE void plan_turn(const BitmapParams& p, BitmapWarp<C>& warp, int word) {
  constexpr int kSize = int(sizeof(typename C::T));
  uint64_t bits[C::kLaneWords];
  load_bits(p, warp, word, bits);
  int mine = 0;
#pragma unroll
  for (int i = 0; i < C::kLaneWords; ++i) mine += popcount64(bits[i]);
  const int all = row_sum<C>(mine);
  const bool last = warp.lane % C::kRowLanes == C::kRowLanes - 1;
  const int64_t byte = warp.position * kSize;
  const int shift = int(byte % 16),
            at = warp.row() * C::kWords + (C::kWords - C::kLaneWords) * last;
  int start = shift + (last ? all - mine : 0) * kSize;
#pragma unroll
  for (int i = 0; i < C::kLaneWords; ++i) {
    warp.bits()[at + i] = bits[i];
    warp.start()[at + i] = start;
    start += popcount64(bits[i]) * kSize;
  }
  if (last) {
    warp.from()[warp.row()] = byte - shift;
    warp.chunks()[warp.row()] = all == 0 ? 0 : (shift + all * kSize + 15) / 16;
  }
  warp.position += all;
}

// The turn's values to shared memory. Eight lanes a row: 128 adjacent bytes.
template <class C>
TT_DEVICE void copy_turn(const BitmapParams& p, const BitmapWarp<C>& warp) {
  const int64_t end = p.count * int64_t(sizeof(typename C::T));
#pragma unroll 1
  for (int row = warp.lane / 8; row < C::kRows; row += 4) {
    const int64_t from = warp.from()[row];
    const int chunks = warp.chunks()[row];
#pragma unroll 1
    for (int c = warp.lane % 8; c < chunks; c += 8) {
      const int64_t at = from + 16 * c, left = end - at;
      cp_async16(warp.shared + row * C::kRowBytes + 16 * c, p.values + (left > 0 ? at : 0),
                 left <= 0   ? 0
                 : left < 16 ? int(left)
                             : 16);
    }
  }
  cp_async_commit();
}

// For every window of the warp's share: visit(window's word, its index in the turn), its values in shared
// memory.
template <class C, class Visit>
TT_DEVICE void walk(const BitmapParams& p, BitmapWarp<C> warp, const Visit& visit) {
#pragma unroll 1
  for (int word = warp.begin; word < warp.end; word += C::kWords) {
    __syncwarp();  // the turn before is done with what these overwrite
    plan_turn(p, warp, word);
    __syncwarp();
    copy_turn(p, warp);
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < C::kWords && word + i < warp.end; ++i) visit(word + i, i);
  }
}

}  // namespace
}  // namespace trimtab
