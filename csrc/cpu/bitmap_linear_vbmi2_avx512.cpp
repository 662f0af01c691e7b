// Few rows of x: dot products along the rows of the weight, which pass through memory and the caches as one
// stream. 64 bytes of weights come from one vpexpandb or vpexpandw: with the mask three uops of port 5, so 3
// cycles, for all rows of x together.
//
//   int8: w + 128 is unsigned, as vpdpbusd wants it. What is not kept counts as 128 too, so sum_k (w + 128) x
//   is too large by 128 sum_k x, whatever is kept. One cycle a row of x.
//   bf16: the even and the odd k of 32 widened by a shift and a mask, x likewise apart: 1 cycle, and 1 a row
//   of x. vdpbf16ps would take 2 a row, all of port 5 (measured beside vpexpandw).
#include <immintrin.h>

#include <cstring>

#include "cpu/bitmap_kernels.h"

namespace trimtab {
namespace {

// Bytes asked for before they are needed: the streamers stop at each page of 4 KiB. Once for four
// words of bits: with every word it took a tenth of the time.
constexpr int64_t kValuesAhead = 4096, kBitsAhead = 1024;

struct Int8 {
  using Value = int8_t;
  using Word = uint64_t;
  using Sum = __m512i;
  static constexpr int kParts = 1;
  static constexpr int64_t kStepBytes = 64;  // of a row of x
  static inline void expand(Word bits, const Value* from, __m512i* part) {
    part[0] = _mm512_xor_si512(_mm512_maskz_expandloadu_epi8(bits, from), _mm512_set1_epi8(-128));
  }
  static inline Sum dot(Sum sum, __m512i part, const char* x) {
    return _mm512_dpbusd_epi32(sum, part, _mm512_loadu_si512(x));
  }
  static inline Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static inline uint32_t total(Sum sum, int32_t excess) {
    return uint32_t(_mm512_reduce_add_epi32(sum)) - uint32_t(excess);
  }
  // 128 sum_k x
  static int32_t excess(const char* x, int64_t bytes) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < bytes; k += 64)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), _mm512_loadu_si512(x + k));
    return _mm512_reduce_add_epi32(sum);
  }
};

struct Bf16 {
  using Value = uint16_t;
  using Word = uint32_t;
  using Sum = __m512;
  static constexpr int kParts = 2;
  static constexpr int64_t kStepBytes = 128;
  static inline void split(__m512i pairs, __m512i* part) {
    part[0] = _mm512_slli_epi32(pairs, 16);
    part[1] = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)));
  }
  static inline void expand(Word bits, const Value* from, __m512i* part) {
    split(_mm512_maskz_expandloadu_epi16(bits, from), part);
  }
  static inline Sum dot(Sum sum, __m512i part, const char* x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(part), _mm512_loadu_ps(x), sum);
  }
  static inline Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static inline uint32_t total(Sum sum, int32_t) {
    const float total = _mm512_reduce_add_ps(sum);
    uint32_t bits;
    std::memcpy(&bits, &total, 4);
    return bits;
  }
  static int32_t excess(const char*, int64_t) { return 0; }
};

// sums [m] of one row of the weight; x [kRows], rows x_bytes apart; kLines: of values asked for
template <class D, int kRows, int kLines>
void dot_row(const uint8_t* bits, int64_t row_bytes, const void* from, const char* x,
             int64_t x_bytes, const int32_t* excess, uint32_t* sums) {
  // Sums in turn where there are few: a dot takes longer than a word does.
  constexpr int kSets = kRows <= 4 ? 2 : 1;
  const auto* values = static_cast<const typename D::Value*>(from);
  typename D::Sum sum[kSets][kRows][D::kParts];
  for (auto& set : sum)
    for (auto& row : set)
      for (auto& part : row) part = typename D::Sum{};
  const auto step = [&](int set, int64_t byte) __attribute__((always_inline)) {
    typename D::Word word;
    std::memcpy(&word, bits + byte, sizeof word);
    __m512i part[D::kParts];
    D::expand(word, values, part);
    values += __builtin_popcountll(word);
    for (int m = 0; m < kRows; ++m)
      for (int i = 0; i < D::kParts; ++i)
        sum[set][m][i] = D::dot(sum[set][m][i], part[i], x + m * x_bytes + i * 64);
    x += D::kStepBytes;
  };
  int64_t byte = 0;
  constexpr int64_t kWord = sizeof(typename D::Word);
  for (; byte + 4 * kWord <= row_bytes; byte += 4 * kWord) {
    for (int i = 0; i < kLines; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(values) + kValuesAhead + i * 64, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(bits) + byte + kBitsAhead, _MM_HINT_T0);
    step(0, byte);
    step(kSets - 1, byte + kWord);
    step(0, byte + 2 * kWord);
    step(kSets - 1, byte + 3 * kWord);
  }
  for (; byte + 2 * kWord <= row_bytes; byte += 2 * kWord) {
    step(0, byte);
    step(kSets - 1, byte + kWord);
  }
  if (byte < row_bytes) step(0, byte);  // int8: an odd number of words
  for (int m = 0; m < kRows; ++m) {
    for (int i = 0; i < D::kParts && kSets == 2; ++i)
      sum[0][m][i] = D::add(sum[0][m][i], sum[kSets - 1][m][i]);
    if constexpr (D::kParts == 2) sum[0][m][0] = D::add(sum[0][m][0], sum[0][m][1]);
    sums[m] = D::total(sum[0][m][0], excess[m]);
  }
}

using DotFn = void (*)(const uint8_t*, int64_t, const void*, const char*, int64_t, const int32_t*,
                       uint32_t*);

template <class D, int kLines>
DotFn dot_of_rows(int64_t rows) {
  static constexpr DotFn kDots[kBitmapDotRows] = {
      dot_row<D, 1, kLines>, dot_row<D, 2, kLines>, dot_row<D, 3, kLines>, dot_row<D, 4, kLines>,
      dot_row<D, 5, kLines>, dot_row<D, 6, kLines>, dot_row<D, 7, kLines>, dot_row<D, 8, kLines>};
  return kDots[rows - 1];
}

template <class D>
DotFn dot_fn(const BitmapBlock& s) {
  // Of 256 bytes at most two lines are kept: with some slack, since rows differ.
  const bool few = s.weight.count < s.N * s.K / 100 * 45;
  return few ? dot_of_rows<D, 2>(s.rows) : dot_of_rows<D, 4>(s.rows);
}

template <class D>
bool dots(const BitmapBlock& s, const SparseOutput& output) {
  const DotFn dot = dot_fn<D>(s);
  alignas(64) uint32_t sums[kSparseTileN * kSparseM] = {};
  const auto* values = static_cast<const typename D::Value*>(s.weight.values);
  const char* x = static_cast<const char*>(s.x);
  int32_t excess[kBitmapDotRows];
  for (int64_t m = 0; m < s.rows; ++m) excess[m] = D::excess(x + m * s.panel_bytes, s.panel_bytes);
  for (int64_t n = s.n_begin; n < s.n_end; n += kSparseTileN) {
    const int cols = int(s.n_end - n < kSparseTileN ? s.n_end - n : kSparseTileN);
    for (int col = 0; col < cols; ++col)
      dot(s.weight.bits + (n + col) * s.row_bytes, s.row_bytes,
          values + s.weight.row_start[n + col], x, s.panel_bytes, excess, sums + col * kSparseM);
    sparse_store(output, sums, kSparseM, 0, int(s.rows), n, cols);
  }
  return true;
}

}  // namespace

bool bitmap_dots_int8_vbmi2_avx512(const BitmapBlock& s, const SparseOutput& output) {
  return dots<Int8>(s, output);
}
bool bitmap_dots_bf16_vbmi2_avx512(const BitmapBlock& s, const SparseOutput& output) {
  return dots<Bf16>(s, output);
}

void bitmap_row_bf16_avx512(const void* x, int64_t K, void* to) {
  const auto* from = static_cast<const uint16_t*>(x);
  auto* parts = static_cast<__m512i*>(to);
  for (int64_t k = 0; k < K; k += 32, parts += 2) {
    const __mmask32 valid = K - k < 32 ? (uint32_t(1) << (K - k)) - 1 : ~uint32_t(0);
    Bf16::split(_mm512_maskz_loadu_epi16(valid, from + k), parts);
  }
  if (K % 64 != 0 && K % 64 <= 32) parts[0] = parts[1] = _mm512_setzero_si512();
}

const int8_t* bitmap_expand_vbmi2_avx512(uint64_t word, const int8_t* values, int8_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi8(word, values));
  return values + __builtin_popcountll(word);
}

}  // namespace trimtab
