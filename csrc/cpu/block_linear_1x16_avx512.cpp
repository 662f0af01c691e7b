// int8 in blocks of 1 x 16: 64 outputs walk along K together, a column of blocks at a time.
//
//   A column's 16 k of four panels stay in 16 registers while the outputs that keep it take turns: for each,
//   4 broadcasts of its weights, 4 sums from L1, 16 vpdpbusd. Output by output instead, every block would
//   fetch those 16 lines from L2, and the loads would set the pace: 10 cycles a block and more, not 8.
//
//   Which outputs keep a column stands in one mask of 64 bits. Within a row of blocks col rises, so an
//   output's next block is the one after its last.
#include <immintrin.h>

#include <cstring>

#include "cpu/block_linear_store.h"
#include "cpu/scratch.h"

namespace trimtab {
namespace {

constexpr int kBlock = 16;  // weights of a block
constexpr int kSteps = kBlock / 4;

// One group of outputs, as many as a mask has bits.
struct Columns {
  const int8_t* begin[kSparseTileN];  // each output's first block
  int32_t start[kSparseTileN];  // -128 sum_k w, since x stands as x + 128
  uint64_t* mask;  // [columns of blocks]
  int64_t count;
};

// -128 times the sum of `count` weights, a multiple of 16
int32_t start_of(const int8_t* w, int64_t count) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= count; k += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(w + k));
  if (k < count) {
    const __mmask64 rest = (uint64_t(1) << (count - k)) - 1;
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(rest, w + k));
  }
  return -128 * _mm512_reduce_add_epi32(sum);
}

void gather(const tt_block_weight& w, const BlockGroup& g, Columns& columns) {
  std::memset(columns.mask, 0, size_t(columns.count) * sizeof(uint64_t));
  for (int64_t row = g.row; row < g.row_end; ++row) {
    const int64_t n = row - g.row;
    const int64_t begin = w.crow[row], end = w.crow[row + 1];
    columns.begin[n] = static_cast<const int8_t*>(w.values) + begin * kBlock;
    columns.start[n] = start_of(columns.begin[n], (end - begin) * kBlock);
    for (int64_t b = begin; b < end; ++b) columns.mask[w.col[b]] |= uint64_t(1) << n;
  }
}

// sums [n][kP][16 m] of kP panels, panel_bytes apart
template <int kP>
void walk(const Columns& columns, int outputs, const char* x, int64_t panel_bytes, int32_t* sums) {
  const int8_t* next[kSparseTileN];
  for (int n = 0; n < outputs; ++n) {
    next[n] = columns.begin[n];
    for (int p = 0; p < kP; ++p)
      _mm512_store_si512(sums + (n * kP + p) * kSparseM, _mm512_set1_epi32(columns.start[n]));
  }
  for (int64_t c = 0; c < columns.count; ++c, x += kSteps * 64) {
    uint64_t keep = columns.mask[c];
    if (keep == 0) continue;
    __m512i value[kP][kSteps];
    for (int p = 0; p < kP; ++p)
      for (int s = 0; s < kSteps; ++s)
        value[p][s] = _mm512_load_si512(x + p * panel_bytes + s * 64);
    do {
      const int n = __builtin_ctzll(keep);
      keep &= keep - 1;
      const int8_t* w = next[n];
      next[n] = w + kBlock;
      int32_t* sum = sums + n * kP * kSparseM;
      __m512i acc[kP];
      for (int p = 0; p < kP; ++p) acc[p] = _mm512_load_si512(sum + p * kSparseM);
      for (int s = 0; s < kSteps; ++s) {
        int32_t four;
        std::memcpy(&four, w + s * 4, 4);
        const __m512i weight = _mm512_set1_epi32(four);
        for (int p = 0; p < kP; ++p) acc[p] = _mm512_dpbusd_epi32(acc[p], value[p][s], weight);
      }
      for (int p = 0; p < kP; ++p) _mm512_store_si512(sum + p * kSparseM, acc[p]);
    } while (keep != 0);
  }
}

}  // namespace

bool block_1x16_avx512(const BlockTask& t) {
  alignas(64) int32_t sums[kSparseTileN * kBlockPanels * kSparseM];
  Columns columns;
  columns.count = (t.weight->K + kBlock - 1) / kBlock;
  columns.mask = static_cast<uint64_t*>(thread_scratch((columns.count + 1) * 8, Scratch::kRow));
  if (columns.mask == nullptr) return false;
  const int64_t panels = (t.rows + kSparseM - 1) / kSparseM;
  for_each_group(t, [&](const BlockGroup& g) {
    gather(*t.weight, g, columns);
    for (int64_t p = 0; p < panels;) {
      const char* x = t.x + p * t.panel_bytes;
      const int outputs = int(g.row_end - g.row);
      const int now = panels - p >= 4 ? 4 : panels - p >= 2 ? 2 : 1;
      prefetch_group(t, g, p, now);
      if (now == 4) walk<4>(columns, outputs, x, t.panel_bytes, sums);
      else if (now == 2) walk<2>(columns, outputs, x, t.panel_bytes, sums);
      else walk<1>(columns, outputs, x, t.panel_bytes, sums);
      store_group_bf16<true>(t, g, p, now, reinterpret_cast<const uint32_t*>(sums), kSparseM,
                             now * kSparseM);
      p += now;
    }
  });
  return true;
}

}  // namespace trimtab
