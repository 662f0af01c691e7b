// Tiles of rows of 64 or 128 bytes on their way to shared memory, so that ldmatrix and cp.async meet no bank
// conflicts.
#pragma once
#include "cuda/int8_chunk.cuh"

namespace trimtab {

// kThreads threads copy rows of kChunks 16-byte chunks, kPassRows of them at once.
template <int kThreads, int kChunks_>
struct CopiedRows {
  static constexpr int kChunks = kChunks_, kRowBytes = 16 * kChunks;
  static constexpr int kPassRows = kThreads / kChunks;
  static_assert(kPassRows % 8 == 0, "a thread's rows share their swizzle");
};

namespace {

// Where chunk c of a row lies: exclusive-or with the row, so that the 8 rows an ldmatrix reads at one chunk,
// and the 8 chunks that 8 threads of cp.async write, are 8 different groups of 4 banks.
template <int kChunks>
TT_DEVICE int swizzled(int row, int chunk) {
  const int key = kChunks == 8 ? row % 8 : row / 2 % 4;  // 64-byte rows: two share 128 bytes
  return row * (16 * kChunks) + (chunk ^ key) * 16;
}

// One thread's share of copying an operand's tiles: the same chunk of every kPassRows-th row.
template <class Shape, int kRows, bool kAligned>
struct TileCopy {
  static constexpr int kPasses = kRows / Shape::kPassRows;
  static_assert(kRows % Shape::kPassRows == 0, "a thread copies whole rows' chunks");
  static_assert(kPasses <= 32, "their bits fit a word");
  const int8_t* from;  // its first row; the others lie below it
  int64_t pass_stride;
  uint32_t inside;  // bit i: row i of its share exists
  int chunk_k;  // where its chunk begins in a row of the tile
  int to;  // where its first chunk goes within the operand's part of the stage

  TT_DEVICE TileCopy(const int8_t* data, int64_t stride, int64_t first_row, int64_t rows) {
    const int row = int(threadIdx.x) / Shape::kChunks, chunk = int(threadIdx.x) % Shape::kChunks;
    from = data + (first_row + row) * stride;
    pass_stride = Shape::kPassRows * stride;
    inside = 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      if (first_row + row + i * Shape::kPassRows < rows) inside |= 1u << i;
    chunk_k = 16 * chunk;
    to = swizzled<Shape::kChunks>(row, chunk);
  }

  // Asks for the tile at byte k of the rows. What lies outside the operand becomes zero.
  TT_DEVICE void issue(char* stage, int k, int K) const {
    if constexpr (!kAligned) return copy(stage, k, K);
    const int left = K - k - chunk_k;
    const int bytes = left < 0 ? 0 : left > 16 ? 16 : left;
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      cp_async16(chunk_of(stage, i), from + i * pass_stride + k + chunk_k,
                 inside >> i & 1 ? bytes : 0);
  }

  TT_DEVICE char* chunk_of(char* stage, int pass) const {
    return stage + to + pass * Shape::kPassRows * Shape::kRowBytes;
  }

  // The same through registers. Away from both ends of the rows, all loads are on the way together.
  TT_DEVICE void copy(char* stage, int k, int K) const {
    Bytes16 chunk[kPasses];
    const bool middle = k >= 16 && k + Shape::kRowBytes + 16 <= K;
    if (middle) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        chunk[i] = inside >> i & 1 ? load_chunk_inside<false>(from + i * pass_stride, k + chunk_k)
                                   : Bytes16{};
    } else {
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        chunk[i] = load_chunk<false>(from + i * pass_stride, k + chunk_k, inside >> i & 1 ? K : 0);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) *reinterpret_cast<Bytes16*>(chunk_of(stage, i)) = chunk[i];
  }
};

}  // namespace
}  // namespace trimtab
