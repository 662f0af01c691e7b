// RMSNorm's factor, in an order of additions that every device follows cheaply:
//
//   partial[i] = sum of x[k]^2 over k = i, i + 2048, i + 4096, ..  in this order, from 0
//   chunk[c]   = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)),  p0.. = partial[8 c]..
//   sum        = chunk[0..255] folded in half: c and c + 128, then + 64, .. + 1
//   r          = 1 / sqrt(sum / K + eps)
//   y[k]       = (x[k] * r) * weight[k]
//
// fp32, each step rounded once. 2048 partials are a block of 256 GPU threads with eight adjacent elements
// each, which a thread adds up alone; on a CPU they are 128 or 256 vectors, eight of which become one by
// adding neighbours. Squares are never -0, so a partial that meets no element changes nothing.
#pragma once
#include "f32x1.h"

namespace trimtab {
namespace {

constexpr int kRmsChunk = 8;
constexpr int kRmsChunks = 256;
constexpr int kRmsPartials = kRmsChunk * kRmsChunks;

TT_INLINE float rms_chunk_sum(const float* p) {
  const F32x1 low = (F32x1(p[0]) + F32x1(p[1])) + (F32x1(p[2]) + F32x1(p[3]));
  const F32x1 high = (F32x1(p[4]) + F32x1(p[5])) + (F32x1(p[6]) + F32x1(p[7]));
  return (low + high).v;
}

TT_INLINE float rms_factor(float sum, int64_t K, float eps) {
  const F32x1 mean = F32x1(sum) / F32x1(static_cast<float>(K));
  return (F32x1(1.0f) / sqrt(mean + F32x1(eps))).v;
}

template <class V>
TT_INLINE V rms_scaled(V x, V r, V weight) {
  return x * r * weight;
}

}  // namespace
}  // namespace trimtab
