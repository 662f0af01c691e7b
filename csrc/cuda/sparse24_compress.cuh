// sparse24_compress on a CUDA device: prune, compress and metadata in one pass (sparse24_compress.h). T: float,
// int8_t, or uint16_t for bf16 and fp16, whose magnitudes order as their bits do.
//
// A block takes a tile of 128 bytes by as many rows as it has columns, through shared memory:
//
//   copy      16 bytes a thread by cp.async, what lies outside becomes zero
//   rows      32 adjacent bytes of a row -> 16 bytes of kept values, stored; their codes to shared memory
//   columns   (both ways) the same 32 bytes down a column: a thread reads a word of 8 to 32 rows, and turns it;
//             a warp reads whole rows, so no bank is met twice. Kept values to shared memory
//   out       the transposed values, 64 bytes a row; codes as metadata and indices
//
// Bytes by weight of 2 bytes: 2 read, 1 + 1 / 8 written each way: 4.25 both ways, where a clone moves 4.
// Where the four bits of groups lie side by side as bytes (an even group in the low half), metadata is a
// gathering of whole bytes: 16 columns of a 16-bit type are 2, 32 of int8 are 4.
#pragma once
#include <trimtab/sparse24_compress.h>

#include "cuda/tile_copy.cuh"
#include "math/sparse24.h"

namespace trimtab {

// tt_sparse24_compressed of a matrix of `rows` rows.
struct Compress24Out {
  int8_t* values;
  int64_t row_bytes;
  uint8_t* indices;  // or NULL, in rows of index_bytes
  uint32_t* metadata;  // or NULL
  int32_t rows, groups;  // groups of four in a row
  int32_t index_bytes, blocks64;
};

struct Compress24Params {
  const int8_t* weight;  // rows `stride` bytes apart
  int64_t stride;
  int32_t weight_bytes;  // of a row
  int32_t tiles_k;
  Compress24Out out, transposed;
};

constexpr int kCompress24Threads = 128;

template <class T>
struct Compress24Tile {
  static constexpr int kSize = int(sizeof(T)), kSide = 128 / kSize;  // rows, and columns
  static constexpr int kCodeRow = kSide / 8;  // bytes of codes of a row
  static constexpr int kCodeBytes = 4 / kSize;  // of 32 bytes of weight
  static constexpr int kItems = kSide * 4 / kCompress24Threads;  // of 32 bytes, a thread
  static constexpr int kMinBlocks =
      kSize == 1 ? 5 : 6;  // a thread holds 32 words of int8, 16 of 2 bytes
  static constexpr int kCodesAt = kSide * 128;
  static constexpr int kSharedBytes = kCodesAt + 2 * kSide * kCodeRow;  // codes of both directions
};

namespace {

// --- a group of four: its code, and its kept half added to `kept`

TT_DEVICE uint32_t take_group(const uint32_t* w, uint32_t* kept, int, float) {
  const uint32_t code =
      code24(w[0] & 0x7fffffffu, w[1] & 0x7fffffffu, w[2] & 0x7fffffffu, w[3] & 0x7fffffffu);
  const uint32_t low = code & 3, high = code >> 2;  // 0 to 2, 1 to 3
  kept[0] = low == 0 ? w[0] : low == 1 ? w[1] : w[2];
  kept[1] = high == 3 ? w[3] : high == 2 ? w[2] : w[1];
  return code;
}

TT_DEVICE uint32_t take_group(const uint32_t* w, uint32_t* kept, int, uint16_t) {
  const uint32_t code =
      code24(w[0] & 0x7fffu, w[0] >> 16 & 0x7fffu, w[1] & 0x7fffu, w[1] >> 16 & 0x7fffu);
  const uint64_t four = uint64_t{w[1]} << 32 | w[0];
  kept[0] = (uint32_t(four >> (16 * (code & 3))) & 0xffffu) | uint32_t(four >> (16 * (code >> 2)))
                                                                  << 16;
  return code;
}

TT_DEVICE uint32_t take_group(const uint32_t* w, uint32_t* kept, int half, int8_t) {
  const uint32_t four = w[0];
  const uint32_t code =
      code24(score24(static_cast<int8_t>(four)), score24(static_cast<int8_t>(four >> 8)),
             score24(static_cast<int8_t>(four >> 16)), score24(static_cast<int8_t>(four >> 24)));
  const uint32_t two = (four >> (8 * (code & 3)) & 0xffu) | (four >> (8 * (code >> 2)) & 0xffu)
                                                                << 8;
  kept[0] = half == 0 ? two : kept[0] | two << 16;
  return code;
}

// 32 bytes of adjacent weights to 16 of kept ones; the groups' codes side by side.
template <class T>
TT_DEVICE uint32_t take_32_bytes(const uint32_t (&w)[8], Bytes16& kept) {
  constexpr int kGroups = 8 / int(sizeof(T));
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int at = i * int(sizeof(T));  // words
    codes |= take_group(w + at, kept.word + at / 2, i % 2, T{}) << (4 * i);
  }
  return codes;
}

// --- codes in shared memory: those of a row side by side

template <int kBytes>
TT_DEVICE void put_codes(uint8_t* to, uint32_t codes) {
  if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(to) = codes;
  else if constexpr (kBytes == 2) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes);
  else *to = static_cast<uint8_t>(codes);
}

// The metadata of a tile whose codes are `codes`; its first row and column are multiples of its side.
template <class T>
TT_DEVICE void store_metadata(const Compress24Out& out, const uint8_t* codes, int row, int column) {
  using Tile = Compress24Tile<T>;
  constexpr int kBlocks = Tile::kSide / 64, kWords = Tile::kSide / 16 * kBlocks * 32;
  const int rows16 = (out.rows + 15) / 16;
#pragma unroll
  for (int first = 0; first < kWords; first += kCompress24Threads) {
    const int at = first + int(threadIdx.x), lane = at % 32, g = lane / 4, i = lane % 4;
    const int block = at / 32 % kBlocks, row16 = at / 32 / kBlocks;
    const uint8_t* from = codes + (row16 * 16 + g) * Tile::kCodeRow + block * 8;
    uint32_t word;
    if constexpr (sizeof(T) == 1)
      word = *reinterpret_cast<const uint32_t*>(from + i % 2 * 8 * Tile::kCodeRow + i / 2 * 4);
    else
      word = *reinterpret_cast<const uint16_t*>(from + 2 * i) |
             uint32_t{*reinterpret_cast<const uint16_t*>(from + 8 * Tile::kCodeRow + 2 * i)} << 16;
    const int to_row = row / 16 + row16, to_block = column / 64 + block;
    if (to_row < rows16 && to_block < out.blocks64)
      store_global(out.metadata + (int64_t(to_row) * out.blocks64 + to_block) * 32 + lane, word);
  }
}

// The same codes as indices; no group beyond the last is named. kWide: rows of whole words.
template <class T, bool kWide>
TT_DEVICE void store_indices(const Compress24Out& out, const uint8_t* codes, int row, int column) {
  using Tile = Compress24Tile<T>;
  constexpr int kStep = kWide ? 4 : 1, kARow = Tile::kCodeRow / kStep;
  for (int at = int(threadIdx.x); at < Tile::kSide * kARow; at += kCompress24Threads) {
    const int to_row = row + at / kARow, byte = column / 8 + at % kARow * kStep;
    const int left = out.groups - 2 * byte;
    if (to_row >= out.rows || left <= 0) continue;
    uint8_t* to = out.indices + int64_t(to_row) * out.index_bytes + byte;
    const uint8_t* from = codes + at / kARow * Tile::kCodeRow + at % kARow * kStep;
    if constexpr (kWide) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
      store_global(reinterpret_cast<uint32_t*>(to),
                   left < 8 ? word & ((1u << (4 * left)) - 1) : word);
    } else {
      store_global(to, static_cast<uint8_t>(left < 2 ? *from & 15 : *from));
    }
  }
}

template <class T>
TT_DEVICE void store_codes(const Compress24Out& out, const uint8_t* codes, int row, int column) {
  if constexpr (sizeof(T) <= 2)
    if (out.metadata != nullptr) store_metadata<T>(out, codes, row, column);
  if (out.indices == nullptr) return;
  if (out.index_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(out.indices) % 4 == 0)
    store_indices<T, true>(out, codes, row, column);
  else store_indices<T, false>(out, codes, row, column);
}

// --- the two directions

TT_DEVICE void store_kept(const Compress24Out& out, int row, int64_t byte, const Bytes16& kept) {
  if (row < out.rows && byte < out.row_bytes)
    store16(out.values + row * out.row_bytes + byte, kept);
}

template <class T>
TT_DEVICE void take_rows(const Compress24Out& out, const char* shared, uint8_t* codes, int row,
                         int column) {
  using Tile = Compress24Tile<T>;
#pragma unroll
  for (int i = 0; i < Tile::kItems; ++i) {
    const int item = i * kCompress24Threads + int(threadIdx.x), r = item / 4, part = item % 4;
    uint32_t w[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Bytes16 chunk =
          *reinterpret_cast<const Bytes16*>(shared + swizzled<8>(r, 2 * part + half));
#pragma unroll
      for (int j = 0; j < 4; ++j) w[4 * half + j] = chunk.word[j];
    }
    Bytes16 kept = {};
    const uint32_t code = take_32_bytes<T>(w, kept);
    put_codes<Tile::kCodeBytes>(codes + r * Tile::kCodeRow + part * Tile::kCodeBytes, code);
    store_kept(out, row + r, int64_t(column) * Tile::kSize / 2 + part * 16, kept);
  }
}

// Word `lane` of kSide / 4 rows, as kept values of its columns. Warp w has the w-th quarter of the rows.
template <class T>
struct TakenColumns {
  using Tile = Compress24Tile<T>;
  static constexpr int kRows = Tile::kSide / 4, kColumns = 4 / Tile::kSize;
  Bytes16 kept[kColumns];

  TT_DEVICE void take(const char* shared, uint8_t* codes) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    uint32_t word[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      word[j] = *reinterpret_cast<const uint32_t*>(
          shared + swizzled<8>(warp * kRows + j, lane / 4) + lane % 4 * 4);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      uint32_t w[8] = {};
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const uint32_t element = sizeof(T) == 4   ? word[j]
                                 : sizeof(T) == 2 ? word[j] >> (16 * c) & 0xffffu
                                                  : word[j] >> (8 * c) & 0xffu;
        w[j / kColumns] |= element << (8 * Tile::kSize * (j % kColumns));
      }
      kept[c] = {};
      const uint32_t code = take_32_bytes<T>(w, kept[c]);
      put_codes<Tile::kCodeBytes>(
          codes + (lane * kColumns + c) * Tile::kCodeRow + warp * Tile::kCodeBytes, code);
    }
  }

  // To rows of 64 bytes, a row a column of the tile.
  TT_DEVICE void stage(char* shared) const {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      *reinterpret_cast<Bytes16*>(shared + swizzled<4>(lane * kColumns + c, warp)) = kept[c];
  }
};

template <class T, bool kAligned, bool kBoth>
__global__ void __launch_bounds__(kCompress24Threads, Compress24Tile<T>::kMinBlocks)
    sparse24_compress_kernel(const __grid_constant__ Compress24Params p) {
  using Tile = Compress24Tile<T>;
  char* shared = shared_memory();
  uint8_t* codes = reinterpret_cast<uint8_t*>(shared + Tile::kCodesAt);
  uint8_t* codes_t = codes + Tile::kSide * Tile::kCodeRow;
  const int row = int(blockIdx.x) / p.tiles_k * Tile::kSide;
  const int column = int(blockIdx.x) % p.tiles_k * Tile::kSide;
  const TileCopy<CopiedRows<kCompress24Threads, 8>, Tile::kSide, kAligned> copy(p.weight, p.stride,
                                                                                row, p.out.rows);
  copy.issue(shared, column * Tile::kSize, p.weight_bytes);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  take_rows<T>(p.out, shared, codes, row, column);
  if constexpr (kBoth) {
    TakenColumns<T> columns;
    columns.take(shared, codes_t);
    __syncthreads();  // the tile has been read
    columns.stage(shared);
  }
  __syncthreads();
  if constexpr (kBoth) {
#pragma unroll
    for (int i = 0; i < Tile::kItems; ++i) {
      const int item = i * kCompress24Threads + int(threadIdx.x), r = item / 4, part = item % 4;
      const Bytes16 kept = *reinterpret_cast<const Bytes16*>(shared + swizzled<4>(r, part));
      store_kept(p.transposed, column + r, int64_t(row) * Tile::kSize / 2 + part * 16, kept);
    }
    store_codes<T>(p.transposed, codes_t, column, row);
  }
  store_codes<T>(p.out, codes, row, column);
}

}  // namespace
}  // namespace trimtab
