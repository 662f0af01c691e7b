// The gradients of block_linear.
//
//   grad_x [M, K] = grad [M, N] W: the forward product with the transposed weight, which is built first; it is
//   as large as the kept blocks and passes through memory once, however many rows there are
//   grad_values = grad^T x at the kept blocks: rows of blocks over threads
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "cpu/block_linear_check.h"
#include "cpu/block_linear_grad.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/sparse_panel.h"
#include "cpu/status.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr int64_t kBlocksATask = 64;  // transposed at once

// [bn, bk] -> [bk, bn]
template <class T>
void transpose_block(const T* from, int64_t bn, int64_t bk, T* to) {
  constexpr int64_t kSquare = 16;  // stays in L1 on both sides
  for (int64_t n0 = 0; n0 < bn; n0 += kSquare)
    for (int64_t k0 = 0; k0 < bk; k0 += kSquare)
      for (int64_t k = k0; k < std::min(k0 + kSquare, bk); ++k)
        for (int64_t n = n0; n < std::min(n0 + kSquare, bn); ++n) to[k * bn + n] = from[n * bk + k];
}

void transpose_block(const SparseLanes& lanes, const float* from, int64_t bn, int64_t bk,
                     float* to) {
  if (bn % 16 != 0 || bk % 16 != 0) return transpose_block(from, bn, bk, to);
  for (int64_t n = 0; n < bn; n += 16)
    for (int64_t k = 0; k < bk; k += 16)
      lanes.transpose(from + n * bk + k, bk, to + k * bn + n, bn);
}

// The transposed weight, its arrays in `scratch`; transposed_bytes() of it.
struct Transposed {
  tt_block_weight weight;

  static int64_t values_bytes(const tt_block_weight& w) {
    return round_up(w.blocks * w.bn * w.bk * dtype_size(w.dtype), 64);
  }
  static int64_t bytes(const tt_block_weight& w) {
    const int64_t columns = (w.K + w.bk - 1) / w.bk;
    return values_bytes(w) + (columns + 2 + 2 * w.blocks) * 4;
  }

  Transposed(const tt_block_weight& w, char* scratch, const SparseLanes& lanes,
             const tt_parallel& pool) {
    const int64_t columns = (w.K + w.bk - 1) / w.bk, rows = (w.N + w.bn - 1) / w.bn;
    int32_t* crow = reinterpret_cast<int32_t*>(scratch + values_bytes(w));
    int32_t* col = crow + columns + 2;
    int32_t* place = col + w.blocks;  // of each block among the transposed
    // crow[c + 1] counts blocks, then says where column c begins, and ends as where it ends.
    std::fill(crow, crow + columns + 2, 0);
    for (int64_t b = 0; b < w.blocks; ++b) ++crow[w.col[b] + 2];
    for (int64_t c = 1; c <= columns; ++c) crow[c + 1] += crow[c];
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t b = w.crow[row]; b < w.crow[row + 1]; ++b) {
        place[b] = crow[w.col[b] + 1]++;
        col[place[b]] = int32_t(row);
      }
    }
    const int64_t size = w.bn * w.bk;
    parallel_run(pool, (w.blocks + kBlocksATask - 1) / kBlocksATask, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kBlocksATask, w.blocks);
      for (int64_t b = task * kBlocksATask; b < end; ++b) {
        if (w.dtype == TT_F32) {
          transpose_block(lanes, static_cast<const float*>(w.values) + b * size, w.bn, w.bk,
                          reinterpret_cast<float*>(scratch) + place[b] * size);
        } else {
          transpose_block(static_cast<const uint16_t*>(w.values) + b * size, w.bn, w.bk,
                          reinterpret_cast<uint16_t*>(scratch) + place[b] * size);
        }
      }
    });
    weight = {scratch, w.dtype, crow, col, w.blocks, w.bk, w.bn, w.K, w.N};
  }
};

tt_status no_memory(const char* op, int64_t bytes) {
  return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", op,
                   (long long)bytes);
}

tt_status check_float(const char* op, const tt_block_weight& weight) {
  if (weight.dtype != TT_I8) return TT_OK;
  return set_error(TT_INVALID_ARGUMENT, "%s: expected values of float32, bfloat16 or float16", op);
}

GradFn grad_kernel(tt_isa isa, const tt_block_weight&) {
  if (isa >= TT_ISA_AVX512) return block_grad_avx512;
  return isa == TT_ISA_SCALAR ? block_grad_scalar : block_grad_avx2;
}

// fp32 sums to the dtype of the values.
template <class T>
void round_sums(const float* sums, int64_t begin, int64_t end, T* to) {
  for (int64_t i = begin; i < end; ++i) {
    if constexpr (std::is_same<T, bf16>::value) to[i] = to_bf16(sums[i]);
    else to[i] = to_fp16(sums[i]);
  }
}

void run_grad(GradTask task, GradFn kernel, void* grad_values, const tt_parallel& pool,
              std::atomic<bool>* memory) {
  const tt_block_weight& w = *task.weight;
  const int64_t rows = (w.N + w.bn - 1) / w.bn, size = w.bn * w.bk;
  const int64_t parts = std::min<int64_t>(rows, 2 * pool.threads);
  // Rows with equal numbers of blocks.
  const auto split = [&](int64_t part) {
    if (part == parts) return rows;
    const int64_t wanted = w.blocks * part / parts;
    return int64_t(std::lower_bound(w.crow, w.crow + rows, wanted) - w.crow);
  };
  parallel_run(pool, parts, [&](int64_t part) {
    GradTask mine = task;
    mine.row_begin = split(part);
    mine.row_end = split(part + 1);
    if (mine.row_begin >= mine.row_end) return;
    const int64_t begin = w.crow[mine.row_begin] * size, end = w.crow[mine.row_end] * size;
    std::fill(mine.sums + begin, mine.sums + end, 0.0f);
    if (begin < end && !kernel(mine)) memory->store(false);
    if (w.dtype == TT_BF16) round_sums(mine.sums, begin, end, static_cast<bf16*>(grad_values));
    if (w.dtype == TT_F16) round_sums(mine.sums, begin, end, static_cast<fp16*>(grad_values));
  });
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_block_grad_x(const void* grad, int64_t grad_stride, const tt_block_weight* weight,
                          int64_t M, void* grad_x, const tt_parallel* parallel) {
  constexpr const char* kOp = "block_grad_x";
  tt_status status = check_block_weight(kOp, weight, M, true);
  if (status == TT_OK) status = check_float(kOp, *weight);
  tt_isa isa;
  if (status == TT_OK) status = current_isa(&isa);
  if (status != TT_OK || M == 0 || weight->K == 0) return status;
  if (grad_x == nullptr || (grad == nullptr && weight->N > 0))
    return set_error(TT_INVALID_ARGUMENT, "%s: grad or grad_x is NULL", kOp);
  const int64_t bytes = Transposed::bytes(*weight);
  char* scratch = static_cast<char*>(thread_scratch(bytes, Scratch::kTransposed));
  if (scratch == nullptr) return no_memory(kOp, bytes);
  const Transposed transposed(*weight, scratch, sparse_lanes(isa), pool_or_serial(parallel));
  const tt_epilogue into = {nullptr, nullptr,   TT_F32,        TT_ACT_NONE,
                            grad_x,  weight->K, weight->dtype, nullptr};
  return run_block_linear(grad, weight->dtype, grad_stride, transposed.weight, M, into, parallel);
}

tt_status tt_block_grad_values(const void* grad, int64_t grad_stride, const void* x,
                               int64_t x_stride, const tt_block_weight* weight, int64_t M,
                               void* grad_values, const tt_parallel* parallel) {
  constexpr const char* kOp = "block_grad_values";
  tt_status status = check_block_weight(kOp, weight, M, false);
  if (status == TT_OK) status = check_float(kOp, *weight);
  tt_isa isa;
  if (status == TT_OK) status = current_isa(&isa);
  if (status != TT_OK || weight->blocks == 0) return status;
  if (grad_values == nullptr || (M > 0 && (grad == nullptr || x == nullptr)))
    return set_error(TT_INVALID_ARGUMENT, "%s: grad, x or grad_values is NULL", kOp);
  const int64_t count = weight->blocks * weight->bn * weight->bk;
  float* sums = weight->dtype == TT_F32
                    ? static_cast<float*>(grad_values)
                    : static_cast<float*>(thread_scratch(count * 4, Scratch::kTransposed));
  if (sums == nullptr) return no_memory(kOp, count * 4);
  const int64_t size = dtype_size(weight->dtype);
  const GradTask task = {weight,
                         0,
                         0,
                         static_cast<const char*>(grad),
                         static_cast<const char*>(x),
                         grad_stride * size,
                         x_stride * size,
                         M,
                         sums};
  std::atomic<bool> memory{true};
  run_grad(task, grad_kernel(isa, *weight), grad_values, pool_or_serial(parallel), &memory);
  if (!memory) return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch in a thread", kOp);
  return TT_OK;
}
