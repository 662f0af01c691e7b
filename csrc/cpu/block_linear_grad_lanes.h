// block_grad_values on any vector type V: rows of grad and x are widened to fp32 chunk by chunk, and each
// tile of a block's gradient, rows n by vectors of k, walks down the chunk.
// Internal linkage: included once an instruction set.
#pragma once
#include <cstring>

#include "cpu/block_linear_grad.h"
#include "cpu/scratch.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int64_t kChunkBytes = int64_t(1) << 20;  // of x, widened: half of a 2 MiB L2
constexpr int64_t kMostChunk = 256;

// Rows of a chunk, and how they stand: `stride` floats apart, not a multiple of 4 KiB.
struct Chunk {
  int64_t rows, grad_stride, x_stride;
  float* grad;
  float* x;
};

template <class V, class T>
void widen_row(const char* from, int64_t begin, int64_t count, int64_t limit, float* to) {
  const T* row = reinterpret_cast<const T*>(from) + begin;
  const int64_t valid = limit - begin < count ? (limit > begin ? limit - begin : 0) : count;
  int64_t i = 0;
  for (; i + V::lanes <= valid; i += V::lanes) V::load(row + i).store(to + i);
  if (i < valid) V::load_n(row + i, int(valid - i)).store_n(to + i, int(valid - i));
  if (valid < count) std::memset(to + valid, 0, size_t(count - valid) * 4);
}

template <class V>
void widen_row(tt_dtype dtype, const char* from, int64_t begin, int64_t count, int64_t limit,
               float* to) {
  switch (dtype) {
    case TT_BF16: return widen_row<V, bf16>(from, begin, count, limit, to);
    case TT_F16: return widen_row<V, fp16>(from, begin, count, limit, to);
    default: return widen_row<V, float>(from, begin, count, limit, to);
  }
}

// sums [kRows rows bk apart] [kVectors of V at k[...]] += grad^T x over the chunk
template <class V, int kRows, int kVectors>
void grad_tile(const Chunk& c, const float* grad, const float* const* x, float* const* sums,
               int64_t bk, int last) {
  V acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V(0.0f);
  for (int64_t m = 0; m < c.rows; ++m) {
    V value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = V::load(x[v] + m * c.x_stride);
    for (int r = 0; r < kRows; ++r) {
      const V by(grad[m * c.grad_stride + r]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(by, value[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums[v] + r * bk;
      if (last == V::lanes) (V::load(to) + acc[r][v]).store(to);
      else (V::load_n(to, last) + acc[r][v]).store_n(to, last);
    }
  }
}

// The vectors of a row of blocks, some at a time: where they stand in x and where their sums go.
template <class V, int kRows, int kVectors>
void grad_row(const GradTask& t, const Chunk& c, int64_t row, int64_t n) {
  const tt_block_weight& w = *t.weight;
  const float* grad = c.grad + (row - t.row_begin) * w.bn + n;
  const float* x[kVectors];
  float* sums[kVectors];
  const int64_t whole = w.bk / V::lanes * V::lanes;
  int held = 0;
  for (int64_t b = w.crow[row]; b < w.crow[row + 1]; ++b) {
    const float* from = c.x + w.col[b] * w.bk;
    float* to = t.sums + (b * w.bn + n) * w.bk;
    for (int64_t k = 0; k < whole; k += V::lanes) {
      x[held] = from + k;
      sums[held++] = to + k;
      if (held < kVectors) continue;
      grad_tile<V, kRows, kVectors>(c, grad, x, sums, w.bk, V::lanes);
      held = 0;
    }
    if (whole < w.bk) {
      const float* rest_x = from + whole;
      float* rest_sums = to + whole;
      grad_tile<V, kRows, 1>(c, grad, &rest_x, &rest_sums, w.bk, int(w.bk - whole));
    }
  }
  for (int v = 0; v < held; ++v) grad_tile<V, kRows, 1>(c, grad, x + v, sums + v, w.bk, V::lanes);
}

// kTall rows of a block by kFew vectors, or one row by kMany.
template <class V, int kTall, int kFew, int kMany>
bool grad_lanes(const GradTask& t) {
  const tt_block_weight& w = *t.weight;
  const int64_t columns = (w.K + w.bk - 1) / w.bk * w.bk, rows = (t.row_end - t.row_begin) * w.bn;
  Chunk c;
  // Vectors at the end of a row read beyond it: 16 floats of room, and a line to part the rows' sets.
  c.x_stride = (columns + 31) / 16 * 16 + 16;
  c.grad_stride = (rows + 15) / 16 * 16 + 16;
  const int64_t fit = kChunkBytes / 4 / c.x_stride;
  const int64_t most = fit < 16 ? 16 : fit < kMostChunk ? fit : kMostChunk;
  c.x = static_cast<float*>(thread_scratch(most * (c.x_stride + c.grad_stride) * 4, Scratch::kRow));
  if (c.x == nullptr) return false;
  c.grad = c.x + most * c.x_stride;
  for (int64_t m = 0; m < t.M; m += most) {
    c.rows = t.M - m < most ? t.M - m : most;
    for (int64_t i = 0; i < c.rows; ++i) {
      widen_row<V>(w.dtype, t.x + (m + i) * t.x_stride, 0, c.x_stride, w.K, c.x + i * c.x_stride);
      widen_row<V>(w.dtype, t.grad + (m + i) * t.grad_stride, t.row_begin * w.bn, rows, w.N,
                   c.grad + i * c.grad_stride);
    }
    for (int64_t row = t.row_begin; row < t.row_end; ++row) {
      int64_t n = 0;
      for (; n + kTall <= w.bn; n += kTall) grad_row<V, kTall, kFew>(t, c, row, n);
      for (; n < w.bn; ++n) grad_row<V, 1, kMany>(t, c, row, n);
    }
  }
  return true;
}

}  // namespace
}  // namespace trimtab
