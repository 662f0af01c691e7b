// The update of optim_step for tensors with smaller formats (optim_memory.cuh). Warp w of a block takes
// elements 256 w .. 256 w + 255 of a tile; of 8-bit states these share a scale.
#pragma once
#include "cuda/optim_elements.cuh"
#include "cuda/optim_memory.cuh"

namespace trimtab {
namespace {

struct CompactRow {
  const OptimRow& row;
  const float* constants;  // of the tensor, with its keys
  bool stochastic;

  // Stream 0: the parameter; 1 + k: state k.
  TT_DEVICE Rounding rounding(int stream) const {
    Rounding r = {stochastic, {0, 0}};
    if (stochastic)
      r.key =
          load_global(on_global(reinterpret_cast<const RandomKey*>(constants + kKeys) + stream));
    return r;
  }
  TT_DEVICE bool rounds_param() const { return stochastic && row.param_dtype == TT_BF16; }
  TT_DEVICE bool rounds_states() const { return stochastic && row.state_dtype == TT_BF16; }
  TT_DEVICE bool has_codes() const { return row.state_dtype == TT_DYNAMIC8; }
  TT_DEVICE bool is_signed(int k) const { return row.signs >> k & 1; }
  TT_DEVICE uint8_t* codes(int k) const { return static_cast<uint8_t*>(row.state[k]); }
};

// --- eight adjacent elements, all there, all aligned

// 16 bits of element j.
TT_DEVICE uint32_t half_word(const RawChunk<float>& raw, int j) {
  return raw.part[0].word[j / 2] >> j % 2 * 16 & 0xffffu;
}

TT_DEVICE void store_half_words(void* data, int64_t at, const uint32_t (&bits)[kEight]) {
  Bytes16 all;
#pragma unroll
  for (int i = 0; i < 4; ++i) all.word[i] = bits[2 * i] | bits[2 * i + 1] << 16;
  store16(on_global(static_cast<uint16_t*>(data) + at), all);
}

// Eight codes in the first two words, their scale in the fifth.
TT_DEVICE RawChunk<float> load_codes(const CompactRow& c, int k, int64_t at) {
  const uint64_t codes = load_global(on_global(reinterpret_cast<const uint64_t*>(c.codes(k) + at)));
  RawChunk<float> raw = {};
  raw.part[0].word[0] = uint32_t(codes);
  raw.part[0].word[1] = uint32_t(codes >> 32);
  raw.part[1].word[0] = float_bits(load_global(on_global(c.row.scale[k] + at / kDynamicBlock)));
  return raw;
}

TT_DEVICE void decode_eight(const CompactRow& c, int k, const RawChunk<float>& raw,
                            float (&x)[kEight]) {
  const float scale = float_from_bits(raw.part[1].word[0]);
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    x[j] = decoded(c.is_signed(k), raw.part[0].word[j / 4] >> j % 4 * 8 & 0xffu, scale);
}

TT_DEVICE void encode_eight(const CompactRow& c, int k, int64_t at, const float (&x)[kEight]) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    const uint32_t bits = magnitude_bits(x[j]);
    largest = bits > largest ? bits : largest;
  }
  const float scale = block_scale(largest), inverse = inverse_scale(scale);
  const Rounding rounding = c.rounding(1 + k);
  uint64_t codes = 0;
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    codes |= uint64_t{encoded(c.is_signed(k), x[j], inverse, rounding, at + j)} << 8 * j;
  store_global(on_global(reinterpret_cast<uint64_t*>(c.codes(k) + at)), codes);
  if (threadIdx.x % 32 == 0) store_global(on_global(c.row.scale[k] + at / kDynamicBlock), scale);
}

TT_DEVICE void store_state(const CompactRow& c, int k, int64_t at, const float (&x)[kEight]) {
  if (c.has_codes()) return encode_eight(c, k, at, x);
  if (!c.rounds_states()) return store_eight(c.row.state[k], c.row.state_dtype, at, x);
  const Rounding rounding = c.rounding(1 + k);
  uint32_t bits[kEight];
#pragma unroll
  for (int j = 0; j < kEight; ++j) bits[j] = to_bf16_bits(x[j], rounding, at + j);
  store_half_words(c.row.state[k], at, bits);
}

// Stores the parameter, and its master if it has one; p becomes what is averaged.
TT_DEVICE void store_param(const CompactRow& c, int64_t at, float (&p)[kEight]) {
  const OptimRow& row = c.row;
  uint32_t bits[kEight];
  if (row.master_kind != TT_MASTER_NONE) {
    uint32_t masters[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) close_master(row.master_kind, p[j], &bits[j], &masters[j]);
    store_half_words(row.param, at, bits);
    store_half_words(row.master, at, masters);
  } else if (c.rounds_param()) {
    const Rounding rounding = c.rounding(0);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      bits[j] = to_bf16_bits(p[j], rounding, at + j);
      p[j] = to_float(bf16{uint16_t(bits[j])});
    }
    store_half_words(row.param, at, bits);
  } else {
    store_eight(row.param, row.param_dtype, at, p);
#pragma unroll
    for (int j = 0; j < kEight; ++j) p[j] = rounded(row.param_dtype, p[j]);
  }
}

template <class Family>
TT_DEVICE void compact_eight(const CompactRow& c, const TensorFacts<typename Family::Constants>& f,
                             int64_t at) {
  const OptimRow& row = c.row;
  const RawChunk<float> raw_p = load_raw(row.param, row.param_dtype, at);
  const RawChunk<float> raw_g = load_raw(row.grad, row.grad_dtype, at);
  RawChunk<float> raw_master = {}, raw_s[Family::kStates];
  if (row.master_kind != TT_MASTER_NONE) raw_master = load_raw(row.master, TT_BF16, at);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    raw_s[k] = {};
    if (k < row.states)
      raw_s[k] = c.has_codes() ? load_codes(c, k, at) : load_raw(row.state[k], row.state_dtype, at);
  }
  float p[kEight], g[kEight], s[Family::kStates][kEight];
  widen(raw_p, row.param_dtype, p);
  widen(raw_g, row.grad_dtype, g);
  if (row.master_kind != TT_MASTER_NONE) {
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      p[j] = open_master(row.master_kind, half_word(raw_p, j), half_word(raw_master, j));
  }
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    if (c.has_codes() && k < row.states) {
      decode_eight(c, k, raw_s[k], s[k]);
    } else {
      widen(raw_s[k], row.state_dtype, s[k]);
    }
  }
  step_elements<Family>(row, f, row.variant, p, g, s);
  if (row.mask != nullptr) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const bool keep = load_global(on_global(row.mask + at + j)) != 0;
      p[j] = keep ? p[j] : 0.0f;
#pragma unroll
      for (int k = 0; k < Family::kStates; ++k) s[k][j] = keep ? s[k][j] : 0.0f;
    }
  }
  if (row.copy != nullptr) store_eight(row.copy, row.copy_dtype, at, p);
  store_param(c, at, p);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < row.states) store_state(c, k, at, s[k]);
  if (row.ema != nullptr) {
    float e[kEight];
    widen(load_raw(row.ema, TT_F32, at), TT_F32, e);
#pragma unroll
    for (int j = 0; j < kEight; ++j) e[j] = averaged(e[j], p[j], f.ema_rest);
    store_eight(row.ema, TT_F32, at, e);
  }
  if (f.zero_grad) {
    const float zero[kEight] = {};
    store_eight(row.grad, row.grad_dtype, at, zero);
  }
}

// --- one element

TT_DEVICE float load_param_one(const OptimRow& row, int64_t at) {
  if (row.master_kind == TT_MASTER_NONE) return load_one(row.param, row.param_dtype, at);
  return open_master(row.master_kind,
                     load_global(on_global(static_cast<const uint16_t*>(row.param) + at)),
                     load_global(on_global(row.master + at)));
}

TT_DEVICE float load_state_one(const CompactRow& c, int k, int64_t at) {
  if (!c.has_codes()) return load_one(c.row.state[k], c.row.state_dtype, at);
  return decoded(c.is_signed(k), load_global(on_global(c.codes(k) + at)),
                 load_global(on_global(c.row.scale[k] + at / kDynamicBlock)));
}

// Returns what is averaged.
TT_DEVICE float store_param_one(const CompactRow& c, int64_t at, float x) {
  const OptimRow& row = c.row;
  uint16_t* const to = static_cast<uint16_t*>(row.param) + at;
  if (row.master_kind != TT_MASTER_NONE) {
    uint32_t bits, master;
    close_master(row.master_kind, x, &bits, &master);
    store_global(on_global(to), uint16_t(bits));
    store_global(on_global(row.master + at), uint16_t(master));
    return x;
  }
  if (c.rounds_param()) {
    const uint16_t bits = to_bf16_bits(x, c.rounding(0), at);
    store_global(on_global(to), bits);
    return to_float(bf16{bits});
  }
  store_one(row.param, row.param_dtype, at, x);
  return rounded(row.param_dtype, x);
}

// An 8-bit state's value goes to `staged` instead.
TT_DEVICE void store_state_one(const CompactRow& c, int k, int64_t at, float x, float* staged) {
  if (c.has_codes()) {
    *staged = x;
  } else if (c.rounds_states()) {
    store_global(on_global(static_cast<uint16_t*>(c.row.state[k]) + at),
                 to_bf16_bits(x, c.rounding(1 + k), at));
  } else {
    store_one(c.row.state[k], c.row.state_dtype, at, x);
  }
}

// staged: of state k at k * kEight * kUpdateThreads
template <class Family>
TT_DEVICE void compact_one(const CompactRow& c, const TensorFacts<typename Family::Constants>& f,
                           int64_t at, float* staged) {
  const OptimRow& row = c.row;
  float p[1] = {load_param_one(row, at)};
  float g[1] = {load_one(row.grad, row.grad_dtype, at)};
  float s[Family::kStates][1];
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k) {
    s[k][0] = 0.0f;
    if (k < row.states) s[k][0] = load_state_one(c, k, at);
  }
  step_elements<Family>(row, f, at < row.body ? row.variant : row.tail, p, g, s);
  const bool keep = row.mask == nullptr || load_global(on_global(row.mask + at)) != 0;
  p[0] = keep ? p[0] : 0.0f;
  if (row.copy != nullptr) store_one(row.copy, row.copy_dtype, at, p[0]);
  const float stored = store_param_one(c, at, p[0]);
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < row.states)
      store_state_one(c, k, at, keep ? s[k][0] : 0.0f, staged + k * kEight * kUpdateThreads);
  if (row.ema != nullptr)
    store_global(on_global(row.ema + at),
                 averaged(load_global(on_global(row.ema + at)), stored, f.ema_rest));
  if (f.zero_grad) store_one(row.grad, row.grad_dtype, at, 0.0f);
}

// The staged values of a warp's block to codes and a scale.
TT_DEVICE void encode_staged(const CompactRow& c, int k, int64_t begin, int64_t last,
                             const float* staged) {
  const int64_t lane = threadIdx.x % 32;
  uint32_t largest = 0;
#pragma unroll 1
  for (int j = 0; j < kEight; ++j) {
    const bool there = begin + 32 * j + lane < last;
    const uint32_t bits = there ? magnitude_bits(staged[j * kUpdateThreads]) : 0;
    largest = bits > largest ? bits : largest;
  }
  const float scale = block_scale(largest), inverse = inverse_scale(scale);
  const Rounding rounding = c.rounding(1 + k);
#pragma unroll 1
  for (int j = 0; j < kEight; ++j) {
    const int64_t at = begin + 32 * j + lane;
    if (at >= last) continue;
    const uint32_t code =
        encoded(c.is_signed(k), staged[j * kUpdateThreads], inverse, rounding, at);
    store_global(on_global(c.codes(k) + at), uint8_t(code));
  }
  if (lane == 0) store_global(on_global(c.row.scale[k] + begin / kDynamicBlock), scale);
}

// The warp's part of a tile that is not whole or not aligned. Each thread reads what it has staged itself.
template <class Family>
TT_DEVICE void compact_block(const CompactRow& c, const TensorFacts<typename Family::Constants>& f,
                             int64_t tile, int64_t last) {
  const int64_t begin = tile + int64_t{threadIdx.x} / 32 * kDynamicBlock, lane = threadIdx.x % 32;
  float* const staged = reinterpret_cast<float*>(shared_memory() + kCompactTables) + threadIdx.x;
#pragma unroll 1
  for (int j = 0; j < kEight; ++j) {
    const int64_t at = begin + 32 * j + lane;
    if (at >= 0 && at < last) compact_one<Family>(c, f, at, staged + j * kUpdateThreads);
  }
  if (!c.has_codes() || begin >= last) return;  // the whole warp's answer
#pragma unroll
  for (int k = 0; k < Family::kStates; ++k)
    if (k < c.row.states) encode_staged(c, k, begin, last, staged + k * kEight * kUpdateThreads);
}

}  // namespace
}  // namespace trimtab
