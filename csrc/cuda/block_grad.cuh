// The gradient of block_linear's kept values: a product that is computed where a block is kept.
//
//   values[b][i][j] = sum_m grad[m][row(b) bn + i] * x[m][col(b) bk + j]
//
// A thread block computes kN outputs' gradients of 128 columns over a stretch of tokens (part), which come by
// cp.async in kStages stages of 128 / sizeof(T) tokens. Both operands have their tokens one below the other, so
// fragments of mma are read by ldmatrix transposed; float32 multiplies and adds.
//
//   gathered  blocks of 16 x 16, 32 x 32, 64 x 64: the columns are those of 8, 4 or 2 kept blocks of a row of
//             blocks, side by side. At 64 x 64 in bf16 a token's 384 bytes serve 16384 operations, 43 a byte: at
//             L2's 5.5 TB/s a quarter of H100's dense rate, for the kept tenth of the work.
//   sampled   other blocks: 64 outputs and 128 columns as they lie, of which the kept blocks' parts are stored. That
//             is the dense product's work, but for tiles without a kept block, and none of its memory.
//
// Rows of blocks may hold any number of blocks: groups are counted so that each is one thread block's work (find_group).
//
// Parts are added in their order by block_grad_finish_kernel: the same bits in every run. Nothing outside the
// operands is read or written, whatever crow and col hold.
#pragma once
#include "cuda/block_mm.cuh"

namespace trimtab {

struct BlockGradParams {
  const char* grad;  // [M, N] of T, rows grad_stride bytes apart, whole 16 bytes
  int64_t grad_stride;
  const char* x;  // [M, K], likewise
  int64_t x_stride;
  const int32_t* crow;  // [rows + 1]
  const int32_t* col;  // [blocks]
  int32_t blocks, rows, bn, bk;
  int32_t M, N, K;
  int32_t tiles_k;  // sampled: tiles of 128 columns
  int32_t steps, parts;  // of all tokens
  void* values;  // [blocks, bn, bk] of T
  float* partial;  // [parts][blocks, bn, bk] where parts > 1
};

template <class T_, int kN_>
struct BlockGradTile {
  using T = T_;
  static constexpr int kSize = int(sizeof(T)), kN = kN_, kColumns = 128;
  static constexpr int kThreads = 128, kStages = 3;
  static constexpr int kTokens = 128 / kSize;  // of a stage
  static constexpr int kGradChunks = kN * kSize / 16, kXChunks = kColumns * kSize / 16;
  static constexpr int kXAt = kTokens * kGradChunks * 16;
  static constexpr int kStageBytes = kXAt + kTokens * kXChunks * 16;
  static constexpr int kPitch = kColumns + 4;
  // The words behind the stages: whether a sampled tile has a kept block.
  static constexpr int kSharedBytes = kStages * kStageBytes + 16;
  static constexpr int kFragmentsN = kN / 16, kFragmentsK = kColumns / 4 / 8;  // a warp's
  static constexpr int kSums = kN * kColumns / kThreads;

  static_assert(kThreads % kXChunks == 0 && kThreads % kGradChunks == 0, "a thread has one chunk");
  static_assert(kN * kPitch * 4 <= kStages * kStageBytes, "the sums fit the stages");
};

namespace {

// The kept blocks first .. first + count - 1 of a row of blocks.
struct BlockGroup {
  int row, first, count;
};

TT_DEVICE int row_start(const BlockGradParams& p, int row) {
  const int b = load_global(p.crow + row);
  return b < 0 ? 0 : b < p.blocks ? b : p.blocks;
}

// Group `slot`: rows r have the slots from start(r) / kEach + r on, at least as many as they have groups, as
// (b + n) / kEach - b / kEach + 1 >= ceil(n / kEach). Slots beyond are empty.
template <int kEach>
TT_DEVICE BlockGroup find_group(const BlockGradParams& p, int slot) {
  int low = 0, high = p.rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (row_start(p, middle) / kEach + middle <= slot) low = middle;
    else high = middle - 1;
  }
  const int begin = row_start(p, low), end = row_start(p, low + 1);
  const int64_t first = begin + int64_t(slot - begin / kEach - low) * kEach;
  if (first < begin || first >= end) return {low, 0, 0};
  return {low, int(first), end - int(first) < kEach ? end - int(first) : kEach};
}

// Rows of kChunks 16-byte chunks, so that the eight rows an ldmatrix reads at one chunk lie in different banks.
template <int kChunks>
TT_DEVICE int grad_swizzle(int row, int chunk) {
  const int key = kChunks >= 8 ? row % 8 : kChunks == 4 ? row / 2 % 4 : row / 4 % 2;
  return (row * kChunks + (chunk ^ key)) * 16;
}

// A thread's share of an operand: one chunk of every token that is its own.
template <int kThreads, int kChunks, int kTokens>
struct TokenCopy {
  static constexpr int kStep = kThreads / kChunks, kPasses = kTokens / kStep;
  static_assert(kTokens % kStep == 0, "whole passes");
  const char* from;  // its chunk of token 0
  int64_t stride;
  int bytes;  // that exist

  // Byte `at` of the rows, of which `size` bytes exist; negative where there is none.
  TT_DEVICE TokenCopy(const char* data, int64_t row_stride, int64_t at, int64_t size) {
    const int64_t left = at < 0 ? 0 : size - at;
    bytes = left <= 0 ? 0 : left < 16 ? int(left) : 16;
    from = bytes > 0 ? data + at : data;
    stride = row_stride;
  }

  TT_DEVICE void issue(char* to, int64_t first, int M) const {
    const int token = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int64_t m = first + token + i * kStep;
      const bool exists = m < M && bytes > 0;
      cp_async16(to + grad_swizzle<kChunks>(token + i * kStep, chunk),
                 exists ? from + m * stride : from, exists ? bytes : 0);
    }
  }
};

// --- products of a stage

template <class C>
using BlockGradSums = float[C::kSums / 4][4];

// Warp w: all kN outputs, columns 32 w .. 32 w + 31; sum 4 (i kFragmentsK + j) + r as mma's d[r].
template <class C>
TT_DEVICE void multiply_tokens(const char* stage, BlockGradSums<C>& sums) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int k = 0; k < C::kTokens; k += 16) {
    uint32_t a[C::kFragmentsN][4], b[C::kFragmentsK / 2][4];
    // Matrices: tokens 0-7 of outputs 0-7 and 8-15, then tokens 8-15
#pragma unroll
    for (int i = 0; i < C::kFragmentsN; ++i)
      ldmatrix_x4_trans(a[i], stage + grad_swizzle<C::kGradChunks>(k + lane / 16 * 8 + lane % 8,
                                                                   2 * i + lane / 8 % 2));
    // Matrices: columns 0-7 of tokens 0-7 and 8-15, then columns 8-15
#pragma unroll
    for (int j = 0; j < C::kFragmentsK / 2; ++j)
      ldmatrix_x4_trans(b[j], stage + C::kXAt +
                                  grad_swizzle<C::kXChunks>(k + lane / 8 % 2 * 8 + lane % 8,
                                                            4 * warp + 2 * j + lane / 16));
#pragma unroll
    for (int i = 0; i < C::kFragmentsN; ++i)
#pragma unroll
      for (int j = 0; j < C::kFragmentsK; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        block_mma(sums[i * C::kFragmentsK + j], a[i], pair, typename C::T{});
      }
  }
}

// float32: thread 16 g + t has outputs g kN / 8 .. and columns 4 t .. 4 t + 3 and 64 + 4 t ..; sum 8 i + c.
template <class C>
TT_DEVICE void add_tokens(const char* stage, BlockGradSums<C>& sums) {
  constexpr int kOutputs = C::kN / 8;
  const int g = int(threadIdx.x) / 16, t = int(threadIdx.x) % 16;
#pragma unroll 4
  for (int token = 0; token < C::kTokens; ++token) {
    float w[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int n = g * kOutputs + i;
      w[i] = *reinterpret_cast<const float*>(stage + grad_swizzle<C::kGradChunks>(token, n / 4) +
                                             n % 4 * 4);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Bytes16 x = *reinterpret_cast<const Bytes16*>(
          stage + C::kXAt + grad_swizzle<C::kXChunks>(token, 16 * half + t));
#pragma unroll
      for (int i = 0; i < kOutputs; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& sum = sums[2 * i + half][c];
          sum = fma(F32x1(w[i]), F32x1(float_from_bits(x.word[c])), F32x1(sum)).v;
        }
    }
  }
}

// Sum s of this thread as (output, column) of the tile.
template <class C>
TT_DEVICE int sum_place(int s) {
  if constexpr (C::kSize == 4) {
    const int g = int(threadIdx.x) / 16, t = int(threadIdx.x) % 16;
    return (g * (C::kN / 8) + s / 8) * C::kPitch + s / 4 % 2 * 64 + 4 * t + s % 4;
  } else {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int i = s / 4 / C::kFragmentsK, j = s / 4 % C::kFragmentsK, r = s % 4;
    return (16 * i + lane / 4 + r / 2 * 8) * C::kPitch + 32 * warp + 8 * j + lane % 4 * 2 + r % 2;
  }
}

// The tile's sums over this part's tokens, as [kN][kPitch] in shared memory. The thread's chunks are at byte
// `grad_at` of a row of grad and `x_at` of x; negative where there is no such column.
template <class C>
TT_DEVICE const float* sum_tokens(const BlockGradParams& p, char* shared, int64_t grad_at,
                                  int64_t x_at) {
  constexpr int kStages = C::kStages;
  const TokenCopy<C::kThreads, C::kGradChunks, C::kTokens> grad(p.grad, p.grad_stride, grad_at,
                                                                int64_t(p.N) * C::kSize);
  const TokenCopy<C::kThreads, C::kXChunks, C::kTokens> x(p.x, p.x_stride, x_at,
                                                          int64_t(p.K) * C::kSize);
  const int first = int(int64_t(p.steps) * blockIdx.y / p.parts);
  const int last = int(int64_t(p.steps) * (blockIdx.y + 1) / p.parts);
  // A group a step, empty past the last one, so that the waits below can count groups.
  const auto ask = [&](int step, int stage) {
    if (step < last) {
      char* to = shared + stage * C::kStageBytes;
      grad.issue(to, int64_t(step) * C::kTokens, p.M);
      x.issue(to + C::kXAt, int64_t(step) * C::kTokens, p.M);
    }
    cp_async_commit();
  };
  BlockGradSums<C> sums = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) ask(first + i, i);
  int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    // This step's group has landed; every warp is done with the stage before it, which may be overwritten.
    cp_async_wait<kStages - 2>();
    __syncthreads();
    ask(step + kStages - 1, free_stage);
    const char* from = shared + stage * C::kStageBytes;
    if constexpr (C::kSize == 4) add_tokens<C>(from, sums);
    else multiply_tokens<C>(from, sums);
    free_stage = stage;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  __syncthreads();  // the stages are free for the sums
  float* words = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int s = 0; s < C::kSums; ++s) words[sum_place<C>(s)] = sums[s / 4][s % 4];
  __syncthreads();
  return words;
}

// --- sums to values

template <class T>
TT_DEVICE void store_rounded(T* to, float sum) {
  if constexpr (sizeof(T) == 4) store_global(to, sum);
  else if constexpr ((std::is_same<T, bf16>::value)) store_global(to, to_bf16(sum));
  else store_global(to, to_fp16(sum));
}

// Element `at` of values is that sum of output n and column k; 0 where they do not exist.
template <class T>
TT_DEVICE void store_sum(const BlockGradParams& p, int64_t at, int64_t n, int64_t k, float sum) {
  if (n >= p.N || k >= p.K) sum = 0.0f;
  const int64_t all = int64_t(p.blocks) * p.bn * p.bk;
  if (p.parts > 1) store_global(p.partial + blockIdx.y * all + at, sum);
  else store_rounded(static_cast<T*>(p.values) + at, sum);
}

// --- blocks of kN x kN. Grid: groups of 128 / kN kept blocks, parts.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    block_grad_gathered_kernel(const __grid_constant__ BlockGradParams p) {
  constexpr int kEach = C::kColumns / C::kN, kBlockChunks = C::kGradChunks;
  const BlockGroup group = find_group<kEach>(p, int(blockIdx.x));
  if (group.count == 0) return;
  const int chunk = int(threadIdx.x) % C::kXChunks, block = chunk / kBlockChunks;
  const int column = block < group.count ? load_global(p.col + group.first + block) : -1;
  const int64_t block_bytes = int64_t(C::kN) * C::kSize;
  const int64_t x_at = column < 0 ? -1 : column * block_bytes + chunk % kBlockChunks * 16;
  const int64_t grad_at = group.row * block_bytes + int64_t(int(threadIdx.x) % C::kGradChunks) * 16;
  const float* words = sum_tokens<C>(p, shared_memory(), grad_at, x_at);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < group.count * C::kN * C::kN; i += C::kThreads) {
    const int b = i / (C::kN * C::kN), n = i / C::kN % C::kN, k = i % C::kN;
    const int64_t first_k = int64_t(load_global(p.col + group.first + b)) * C::kN;
    store_sum<typename C::T>(p, int64_t(group.first) * C::kN * C::kN + i,
                             int64_t(group.row) * C::kN + n, first_k + k,
                             words[n * C::kPitch + b * C::kN + k]);
  }
}

// --- blocks of any size

// visit(block, its first output, its first column) for every kept block that reaches into the tile of outputs
// n .. n + kN - 1 and columns k .. k + 127; warps take turns with rows of blocks.
template <class C, class Visit>
TT_DEVICE void visit_blocks(const BlockGradParams& p, int64_t n, int64_t k, const Visit& visit) {
  const int warp = int(threadIdx.x) / 32;
  const int64_t last = (n + C::kN - 1) / p.bn < p.rows - 1 ? (n + C::kN - 1) / p.bn : p.rows - 1;
#pragma unroll 1
  for (int64_t row = n / p.bn + warp; row <= last; row += C::kThreads / 32) {
    const int end = row_start(p, int(row) + 1);
#pragma unroll 1
    for (int b = row_start(p, int(row)); b < end; ++b) {
      const int64_t first_k = int64_t(load_global(p.col + b)) * p.bk;
      if (first_k < k + C::kColumns && first_k + p.bk > k && first_k >= 0)
        visit(b, row * p.bn, first_k);
    }
  }
}

// What of a block lies in the tile, to values; a lane an element.
template <class C>
TT_DEVICE void store_overlap(const BlockGradParams& p, const float* words, int64_t n, int64_t k,
                             int b, int64_t first_n, int64_t first_k) {
  const int lane = int(threadIdx.x) % 32;
  const auto later = [](int64_t a, int64_t c) { return a > c ? a : c; };
  const auto sooner = [](int64_t a, int64_t c) { return a < c ? a : c; };
  const int64_t n0 = later(first_n, n), n1 = sooner(first_n + p.bn, n + C::kN);
  const int64_t k0 = later(first_k, k), k1 = sooner(first_k + p.bk, k + C::kColumns);
  const int wide = int(k1 - k0), count = int(n1 - n0) * wide;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    const int64_t row = n0 + i / wide, column = k0 + i % wide;
    store_sum<typename C::T>(p, (int64_t(b) * p.bn + row - first_n) * p.bk + column - first_k, row,
                             column, words[(row - n) * C::kPitch + column - k]);
  }
}

// Grid: tiles, those of one stretch of outputs one after the other; parts.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    block_grad_sampled_kernel(const __grid_constant__ BlockGradParams p) {
  char* shared = shared_memory();
  int* kept = reinterpret_cast<int*>(shared + C::kStages * C::kStageBytes);
  const int64_t n = int64_t(int(blockIdx.x) / p.tiles_k) * C::kN;
  const int64_t k = int64_t(int(blockIdx.x) % p.tiles_k) * C::kColumns;
  if (threadIdx.x == 0) *kept = 0;
  __syncthreads();
  visit_blocks<C>(p, n, k, [&](int, int64_t, int64_t) { *kept = 1; });
  __syncthreads();
  if (*kept == 0) return;
  const int64_t x_at = k * C::kSize + int(threadIdx.x) % C::kXChunks * 16;
  const int64_t grad_at = n * C::kSize + int(threadIdx.x) % C::kGradChunks * 16;
  const float* words = sum_tokens<C>(p, shared, grad_at, x_at);
  visit_blocks<C>(p, n, k, [&](int b, int64_t first_n, int64_t first_k) {
    store_overlap<C>(p, words, n, k, b, first_n, first_k);
  });
}

// values = the parts' sums in their order. Grid: 256 elements a block, in turns.
template <class T>
__global__ void __launch_bounds__(256, 4)
    block_grad_finish_kernel(const __grid_constant__ BlockGradParams p) {
  const int64_t all = int64_t(p.blocks) * p.bn * p.bk, step = int64_t(gridDim.x) * 256;
#pragma unroll 1
  for (int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x; at < all; at += step) {
    F32x1 sum(0.0f);
#pragma unroll 1
    for (int part = 0; part < p.parts; ++part)
      sum = sum + F32x1(load_global(p.partial + part * all + at));
    store_rounded(static_cast<T*>(p.values) + at, sum.v);
  }
}

}  // namespace
}  // namespace trimtab
