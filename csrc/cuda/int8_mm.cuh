// int8_mm on a CUDA device: what int8_mm.cu, int8_linear.cu and the kernels' files share.
//
//   out[m,n] = act(float(sum_k a[m,k] b[n,k]) * b_scale[n] * a_scale[m] + bias[n])
//
// Three kernels, the launcher takes the first that serves:
//   int8_mm_small.cuh  M <= 16: the weight is streamed once, straight into mma fragments
//   int8_mm_sm90.cuh   TMA and wgmma
//   int8_mm_sm80.cuh   cp.async, ldmatrix, mma.sync; any shape, stride and alignment
#pragma once
#include <trimtab/int8_mm.h>

#include <cstdint>

#include "cuda/launch.cuh"

namespace trimtab {

// Split-K: the blocks of one output tile each sum a slice of K. They count themselves in at the tile's
// counter; the last one adds the others' parts (integers: any order gives the same sum) and finishes it.
constexpr int kSplitCounters = 1024;                // tiles that may be split
constexpr int64_t kSplitPartsMost = int64_t(16) << 20;  // bytes of partial sums

struct Int8MmArgs {
  const int8_t* a;  // [M, K], rows a_stride bytes apart
  int64_t a_stride;
  const float* a_scale;  // [M]
  const int8_t* b;       // [N, K], rows b_stride bytes apart
  int64_t b_stride;
  int64_t M, N, K;  // M, N >= 1; both below 2^31
  tt_epilogue epilogue;
  uint32_t* counters;  // kSplitCounters words; NULL where int8_mm_parts_bytes is 0: then no splits
  int32_t* parts;  // int8_mm_parts_bytes(M, N, K) bytes, aligned to 256
  bool counters_are_zero;  // else the launcher that splits calls zero_counters before its kernel
};

// What partial sums may take, whatever the device and the tile: splits * tiles * tile bytes must not exceed
// it. 0 where the output alone gives every multiprocessor work, or K is too short to split.
int64_t int8_mm_parts_bytes(int64_t M, int64_t N, int64_t K);

// Bytes of counters and parts together, as they lie in the caller's workspace; 0 or a multiple of 256.
int64_t int8_mm_workspace_bytes(int64_t M, int64_t N, int64_t K);

// Points args.counters and args.parts into the workspace.
void int8_mm_take_workspace(void* workspace, Int8MmArgs* args);

// Whether rows of 16-byte chunks can be copied whole: pointer and stride are multiples of 16 (with one row
// the stride does not matter).
inline bool rows_aligned16(const void* p, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (stride % 16 == 0 || rows == 1);
}

// Enqueues counters = 0 unless they are already.
tt_status zero_counters(const char* op, const Int8MmArgs& args, tt_stream stream);

// TT_INVALID_ARGUMENT with a message for bad sizes, NULLs, dtypes, strides, activation or workspace.
tt_status check_int8_mm_cuda(const char* op, int64_t M, int64_t N, int64_t K, const int8_t* b,
                             int64_t b_stride, const tt_epilogue* epilogue, const void* workspace,
                             int64_t workspace_bytes);

// The small kernel's shape: 16 `rows` weight rows a block of `warps` warps.
struct SmallPlan {
  int rows;  // 1 or 2
  int warps;  // 1 to 16
};
SmallPlan plan_int8_mm_small(const Int8MmArgs& args, const DeviceFacts& facts);
tt_status launch_int8_mm_small(const char* op, const Int8MmArgs& args, SmallPlan plan,
                               tt_stream stream);

// The sm_80 kernel's tile, an index below sm80_tile_count(), and the slices of K.
struct Sm80Plan {
  int tile;
  int splits;
};
int sm80_tile_count();
// Whether the tile serves the operands' alignment, and the splits fit K, the counters and the parts.
bool sm80_plan_fits(const Int8MmArgs& args, Sm80Plan plan);
Sm80Plan plan_int8_mm_sm80(const Int8MmArgs& args, const DeviceFacts& facts);
tt_status launch_int8_mm_sm80(const char* op, const Int8MmArgs& args, Sm80Plan plan,
                              tt_stream stream);

// Enqueues the product. Arguments are checked already; M = 0 or N = 0 launches nothing.
tt_status launch_int8_mm(const char* op, const Int8MmArgs& args, tt_stream stream);

}  // namespace trimtab
