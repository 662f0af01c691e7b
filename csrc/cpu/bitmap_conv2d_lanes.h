// bitmap_conv2d on any vector type V; internal linkage: included once an instruction set.
//
//   for up to eight vectors of positions p:  for a block of channels:  for each output n of a tile:
//     sums[n] += w * plane[p + offset]  for every tap of n in these channels
//
//   Per tap: one load and one fma a vector, and five instructions for w and the address. The channels of a
//   block are so few that their part of the planes stays in L1 while the outputs pass over it; the sums of
//   the outputs pass through L2 where there are several blocks.
#pragma once
#include "cpu/bitmap_conv2d.h"
#include "cpu/scratch.h"
#include "math/epilogue.h"
#include "math/f32x1.h"

namespace trimtab {
namespace {

constexpr int kConvVectors = 8;  // most of a chunk

template <class V, class T>
void widen_elements(const T* from, int64_t stride, int64_t count, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + V::lanes <= count; i += V::lanes) V::load(from + i).store(to + i);
    if (i < count) V::load_n(from + i, int(count - i)).store_n(to + i, int(count - i));
    return;
  }
  for (; i < count; ++i) to[i] = F32x1::load(from + i * stride).v;
}

template <class V>
void widen_row(const void* from, tt_dtype dtype, int64_t stride, int64_t count, float* to) {
  if (dtype == TT_BF16) return widen_elements<V>(static_cast<const bf16*>(from), stride, count, to);
  if (dtype == TT_F16) return widen_elements<V>(static_cast<const fp16*>(from), stride, count, to);
  widen_elements<V>(static_cast<const float*>(from), stride, count, to);
}

// Sums t of positions [p, p + count) -> output n, but for positions past the end of a row.
template <class V, Activation kActivation, class Out>
void finish_positions(const float* t, const ConvTask& task, int64_t p, int64_t count, int64_t n) {
  const SparseConv& conv = *task.conv;
  const bool gaps = conv.width != conv.out_w;
  const int64_t plane = conv.out_h * conv.out_w;
  const int64_t width = gaps ? conv.width : count, valid = gaps ? conv.out_w : count;
  int64_t row = gaps ? p / width : 0, j = gaps ? p % width : 0;
  Out* out = reinterpret_cast<Out*>(task.out) + n * plane + (gaps ? row * conv.out_w : p);
  const V bias(task.bias[n]);
  for (int64_t at = 0; at < count; out += conv.out_w) {
    const int64_t here = valid - j < count - at ? valid - j : count - at;
    Out* to = out + j;
    int64_t i = 0;
    for (; i + V::lanes <= here; i += V::lanes)
      activate<kActivation>(V::load(t + at + i) + bias).store(to + i);
    if (i < here) {
      const int rest = int(here - i);
      activate<kActivation>(V::load_n(t + at + i, rest) + bias).store_n(to + i, rest);
    }
    at += width - j;
    j = 0;
  }
}

template <class V, Activation kActivation>
ConvFinishFn choose_finish_dtype(tt_dtype out_dtype) {
  switch (out_dtype) {
    case TT_BF16: return finish_positions<V, kActivation, bf16>;
    case TT_F16: return finish_positions<V, kActivation, fp16>;
    default: return finish_positions<V, kActivation, float>;
  }
}

template <class V>
ConvFinishFn choose_finish(tt_activation activation, tt_dtype out_dtype) {
  switch (activation) {
    case TT_ACT_RELU: return choose_finish_dtype<V, Activation::relu>(out_dtype);
    case TT_ACT_GELU: return choose_finish_dtype<V, Activation::gelu>(out_dtype);
    case TT_ACT_GELU_TANH: return choose_finish_dtype<V, Activation::gelu_tanh>(out_dtype);
    case TT_ACT_SILU: return choose_finish_dtype<V, Activation::silu>(out_dtype);
    default: return choose_finish_dtype<V, Activation::none>(out_dtype);
  }
}

// sums [kVectors] of one output, from zeros at the first block, += its taps [tap, end) times x
template <class V, int kVectors>
TT_INLINE void add_taps(const ConvTap* tap, const ConvTap* end, const float* x, bool first,
                        float* sums) {
  V sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = first ? V(0.0f) : V::load(sums + v * V::lanes);
  for (; tap < end; ++tap) {
    const float* at = x + tap->offset;
    // In one register: base and index would make two micro-operations of each fma.
    __asm__("" : "+r"(at));
    const V weight(tap->weight);
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(weight, V::load(at + v * V::lanes), sum[v]);
  }
  for (int v = 0; v < kVectors; ++v) sum[v].store(sums + v * V::lanes);
}

// Positions [p, p + count) of all the task's outputs. sums [n_end - n_begin][kVectors * lanes]
template <class V, int kVectors>
void chunk(const ConvTask& task, int64_t p, int64_t count, ConvFinishFn finish, float* sums) {
  const int64_t blocks = task.conv->blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t* begin = task.begin + task.conv->place(task.n_begin, block);
    float* own = sums;
    for (int64_t n = task.n_begin; n < task.n_end; ++n, ++begin) {
      add_taps<V, kVectors>(task.taps + begin[0], task.taps + begin[1], task.planes + p, block == 0,
                            own);
      if (block + 1 == blocks) finish(own, task, p, count, n);
      if (blocks > 1) own += kVectors * V::lanes;
    }
  }
}

template <class V>
bool run_conv(const ConvTask& task, ConvFinishFn finish) {
  using Chunk = void (*)(const ConvTask&, int64_t, int64_t, ConvFinishFn, float*);
  static constexpr Chunk kChunks[kConvVectors] = {chunk<V, 1>, chunk<V, 2>, chunk<V, 3>,
                                                  chunk<V, 4>, chunk<V, 5>, chunk<V, 6>,
                                                  chunk<V, 7>, chunk<V, 8>};
  const int64_t rows = task.conv->blocks == 1 ? 1 : task.n_end - task.n_begin;
  float* sums = static_cast<float*>(
      thread_scratch(rows * kConvVectors * V::lanes * int64_t(sizeof(float)), Scratch::kRow));
  if (sums == nullptr) return false;
  // The last row's end is computed for nobody.
  const int64_t positions = task.rows * task.conv->width - (task.conv->width - task.conv->out_w);
  const int64_t vectors = (positions + V::lanes - 1) / V::lanes;
  const int64_t chunks = (vectors + kConvVectors - 1) / kConvVectors;
  const int64_t wide = (vectors + chunks - 1) / chunks;  // even chunks: 9 vectors as 5 + 4
  for (int64_t v = 0; v < vectors; v += wide) {
    const int64_t now = vectors - v < wide ? vectors - v : wide, p = v * V::lanes;
    const int64_t left = positions - p, count = left < now * V::lanes ? left : now * V::lanes;
    kChunks[now - 1](task, p, count, finish, sums);
  }
  return true;
}

template <class V>
constexpr ConvKernel conv_kernel() {
  return {V::lanes, widen_row<V>, run_conv<V>, choose_finish<V>};
}

}  // namespace
}  // namespace trimtab
