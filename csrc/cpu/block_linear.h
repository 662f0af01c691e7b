// block_linear's kernels: what one of them gets, and the table of them.
//
// The weight is the left operand and x, in the panels of sparse_panel.h, the right one. A group is up to 64
// outputs: several rows of blocks, or a part of a tall one. Its sums come out as C^T, [n][16 m] a panel, and
// leave through sparse_store.
#pragma once
#include <trimtab/block_linear.h>

#include "cpu/sparse_epilogue.h"

namespace trimtab {

constexpr int kBlockPanels = 4;  // panels whose sums wait at the same time

// Rows of blocks [row_begin, row_end), whole groups, by some panels of x.
struct BlockTask {
  const tt_block_weight* weight;
  int64_t row_begin, row_end;
  const char* x;  // panels, panel_bytes apart
  int64_t panel_bytes;
  int64_t m, rows;  // first row of these panels in out; how many there are
  const SparseOutput* out;
  bool pairs;  // out is bf16 without an activation, its stride even: store_group_bf16 may serve
};

struct BlockKernel {
  PanelCell cell;
  bool (*run)(const BlockTask& task);  // false: no memory for scratch
};

// Defined in block_linear_<isa>.cpp; each serves any block and x of any float dtype.
BlockKernel block_kernel_scalar(const tt_block_weight& weight);
BlockKernel block_kernel_avx2(const tt_block_weight& weight);
BlockKernel block_kernel_avx512(const tt_block_weight& weight);
bool block_1x16_avx512(const BlockTask& task);  // int8 in blocks of 1 x 16, x + 128
// run is NULL where the block's shape does not fill tiles.
BlockKernel block_kernel_amx(const tt_block_weight& weight);

namespace {

// Rows of blocks in a group.
inline int64_t group_rows(const tt_block_weight& weight) {
  return weight.bn >= kSparseTileN ? 1 : kSparseTileN / weight.bn;
}

// A group: outputs [n, n + cols) are rows [begin, end) of the blocks of rows [row, row_end).
struct BlockGroup {
  int64_t row, row_end;
  int64_t begin, end;  // inside each block; all of it but where bn > 64
  int64_t n;
  int cols;
};

template <class Body>
inline void for_each_group(const BlockTask& task, Body&& body) {
  const tt_block_weight& w = *task.weight;
  const int64_t step = group_rows(w);
  for (int64_t row = task.row_begin; row < task.row_end; row += step) {
    const int64_t row_end = row + step < task.row_end ? row + step : task.row_end;
    for (int64_t begin = 0; begin < w.bn; begin += kSparseTileN) {
      const int64_t end = w.bn - begin < kSparseTileN ? w.bn : begin + kSparseTileN;
      const int64_t n = row * w.bn + begin, last = (row_end - 1) * w.bn + end;
      if (n >= w.N) break;
      body(BlockGroup{row, row_end, begin, end, n, int((last < w.N ? last : w.N) - n)});
    }
  }
}

// Asks for the lines that store_group will write: their read for ownership then passes while the sums are
// computed.
inline void prefetch_group(const BlockTask& task, const BlockGroup& group, int64_t panel,
                           int panels) {
  const SparseOutput& o = *task.out;
  const int64_t begin = panel * kSparseM, end = begin + panels * kSparseM;
  const int64_t bytes = int64_t(group.cols) * o.out_size;
  for (int64_t m = begin; m < (end < task.rows ? end : task.rows); ++m) {
    const char* out = o.out + ((task.m + m) * o.out_stride + group.n) * o.out_size;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(out + at, 1, 3);
  }
}

// Stores the sums of `panels` panels from `panel` on; panel p's are at sums + p * panel_stride dwords, and
// outputs `stride` apart.
inline void store_group(const BlockTask& task, const BlockGroup& group, int64_t panel, int panels,
                        const void* sums, int64_t panel_stride, int64_t stride = kSparseM) {
  for (int p = 0; p < panels; ++p) {
    const int64_t m = (panel + p) * kSparseM, left = task.rows - m;
    sparse_store(*task.out, static_cast<const uint32_t*>(sums) + p * panel_stride, stride,
                 task.m + m, int(left < kSparseM ? left : kSparseM), group.n, group.cols);
  }
}

}  // namespace
}  // namespace trimtab
