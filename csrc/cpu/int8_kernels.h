// The table of int8 kernels: one row an instruction set. The chooser, the blocking, the tests and the
// benchmark all read it, so a kernel that is listed cannot go untested.
//
// Activations are repacked by the kernel's own pack_a or quantize_a into panels of mr rows:
//
//   panel[k / 64][row][k % 64],  K padded to 64 with zeros
//
// so that one k-step of a panel is contiguous (an AMX tile is one such step of 16 rows). What stands in
// a cell is the kernel's affair: int8, int8 + 128 as uint8, or int16.
//
// A product's rows are spread evenly: 17 rows are 9 + 8, not 16 + 1. A panel then uses its first rows
// alone (Int8Block::mr of them), and what stands in the others is never read into a result.
#pragma once
#include <trimtab/int8_mm.h>

namespace trimtab {

constexpr int64_t kStepK = 64;  // K of one panel step, and of an AMX tile
constexpr int64_t kPanelN = 16;  // columns of one packed weight panel
constexpr int64_t kMaxTileN = 64;  // widest tile a kernel computes at once, in columns
constexpr int kMaxTileM = 32;  // tallest, in rows
constexpr int kMaxBlockM = 512;  // rows of one block at most
constexpr int64_t kWeightInL2 = 1536 << 10;  // bytes of weight that stay in a 2 MiB L2

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t packed_panel_bytes(int64_t K) { return round_up(K, 4) * kPanelN; }

// Scales, activates, rounds and stores an int32 tile.
// acc [rows][cols] int32, rows acc_stride apart;  a_scale [rows], b_scale and bias [cols] at this tile
// inverse 1 / out_scale, which int8 out alone has; out at this tile, rows out_stride elements apart
using EpilogueFn = void (*)(const int32_t* acc, int acc_stride, int rows, int cols,
                            const float* a_scale, const float* b_scale, const float* bias,
                            float inverse, void* out, int64_t out_stride);

// One block of the product: `panels` row panels by columns [n_begin, n_end), over all of K.
struct Int8Block {
  const void* a;  // first panel; panels are a_panel_bytes apart
  int64_t a_panel_bytes;
  const float* a_scale;  // [rows]
  int64_t rows;  // valid rows in these panels
  int mr;  // rows in each of them but the last; at most the kernel's mr
  const int8_t* b;  // the whole packed weight
  int64_t K, N, n_begin, n_end;  // n_begin a multiple of kPanelN
  const float* b_scale;  // [N]
  const float* bias;  // [N], -0.0 where there is none: t + -0.0 is t for every t
  float inverse;  // 1 / out_scale, for int8 out
  char* out;  // row 0 of these panels, column 0 of the matrix
  int64_t out_stride;  // elements
  int out_size;  // bytes an element
  EpilogueFn epilogue;
};

struct Int8Kernel {
  tt_isa isa;
  int mr;  // rows that an activation panel has room for
  int a_cell;  // bytes of one activation in a panel
  int tile_panels;  // row panels of the tallest tile
  // int8 rows -> panel
  void (*pack_a)(const int8_t* a, int64_t a_stride, int rows, int64_t K, void* panel);
  // float rows -> panel and scales
  void (*quantize_a)(const void* x, tt_dtype dtype, int64_t x_stride, int rows, int64_t K,
                     void* panel, float* scale);
  void (*block)(const Int8Block& block);
  EpilogueFn (*epilogue)(tt_activation activation, tt_dtype out_dtype);
};

// The row for an instruction set and a product of M rows with a weight of that many bytes.
const Int8Kernel& int8_kernel(tt_isa isa, int64_t M, int64_t weight_bytes);

// One plain row of quantize_int8, by the best kernel of each instruction set.
using QuantizeRowFn = void (*)(const void* x, tt_dtype dtype, int64_t K, int8_t* q, float* scale);
QuantizeRowFn quantize_row(tt_isa isa);

// Each instruction set's entry points; defined in <op>_<isa>.cpp.
#define TT_DECLARE_INT8_KERNEL(isa)                                                        \
  void int8_pack_a_##isa(const int8_t*, int64_t, int, int64_t, void*);                     \
  void int8_quantize_a_##isa(const void*, tt_dtype, int64_t, int, int64_t, void*, float*); \
  void int8_block_##isa(const Int8Block&);
TT_DECLARE_INT8_KERNEL(scalar)
TT_DECLARE_INT8_KERNEL(avx2)
TT_DECLARE_INT8_KERNEL(avxvnni)
TT_DECLARE_INT8_KERNEL(avx512)
TT_DECLARE_INT8_KERNEL(amx)
#undef TT_DECLARE_INT8_KERNEL

EpilogueFn int8_epilogue_scalar(tt_activation, tt_dtype);
EpilogueFn int8_epilogue_avx2(tt_activation, tt_dtype);
EpilogueFn int8_epilogue_avx512(tt_activation, tt_dtype);
void quantize_row_scalar(const void*, tt_dtype, int64_t, int8_t*, float*);
void quantize_row_avx2(const void*, tt_dtype, int64_t, int8_t*, float*);
void quantize_row_avx512(const void*, tt_dtype, int64_t, int8_t*, float*);

}  // namespace trimtab
