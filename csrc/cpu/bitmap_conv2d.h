// bitmap_conv2d's plan, which its parts share, and the table of its kernels.
//
// A band of an image's output rows is computed from planes: the rows of each channel that it needs, padded
// and in fp32. Of a plane all stand at equal distance that one tap meets, whatever the stride:
//
//   plane[c][phase][row][width],  phase = (kh * dilation_h % stride_h, kw * dilation_w % stride_w)
//   output (i, j) is position p = i * width + j;  its factor of tap (c, kh, kw) stands at p + offset
//
// so a vector of neighbouring positions is one load for each tap, and a few positions at the end of each
// row are computed for nothing. Taps are decoded once a call.
#pragma once
#include <trimtab/bitmap_conv2d.h>

#include <vector>

namespace trimtab {

// A kept weight and where its factor stands, in floats from position 0.
struct ConvTap {
  float weight;
  int32_t offset;
};

struct SparseConv {
  tt_conv2d s;
  int64_t out_h, out_w, channels, outputs, K;  // the latter three of a group
  int64_t reach_h, width;  // rows of a plane beyond those of the output; its row
  std::vector<int32_t> phases;  // h * stride_w + w of those that a tap meets
  std::vector<int32_t> phase_at;  // [stride_h * stride_w] their places in `phases`
  int64_t band_rows = 0, bands = 0, plane = 0;  // plane: floats
  int64_t block_channels = 0, blocks = 0;  // whose factors stay in L1 while a tile meets them
  int64_t tile_rows = 0, tiles = 0;  // outputs whose sums stay in L2

  explicit SparseConv(const tt_conv2d& shape);
  // Bands of as many rows and tiles of as many outputs, at most.
  void cut(int64_t rows, int64_t outputs_a_tile, int64_t lanes);
  // The place of output n's taps in block `block`: taps stand in the order in which they are met.
  int64_t place(int64_t n, int64_t block) const {
    const int64_t first = n / tile_rows * tile_rows, left = s.out_channels - first;
    return first * blocks + block * (left < tile_rows ? left : tile_rows) + n - first;
  }
  int64_t plane_floats() const { return s.channels * int64_t(phases.size()) * plane + kSlack; }
  int32_t offset(int64_t group, int64_t k) const;
  // What vectors may read past the last plane: zeros.
  static constexpr int64_t kSlack = 256;
};

// A tile of one band.
struct ConvTask {
  const SparseConv* conv;
  const ConvTap* taps;
  const int64_t* begin;  // [out_channels * blocks + 1] into taps, by place()
  const float* planes;
  const float* bias;  // [out_channels], -0.0 where there is none
  int64_t n_begin, n_end, rows;
  char* out;  // output 0 at the band's first row
};

using ConvFinishFn = void (*)(const float* t, const ConvTask& task, int64_t p, int64_t count,
                              int64_t n);

struct ConvKernel {
  int lanes;
  // row of x, elements `stride` apart -> fp32
  void (*widen)(const void* from, tt_dtype dtype, int64_t stride, int64_t count, float* to);
  bool (*run)(const ConvTask& task, ConvFinishFn finish);  // false: no memory for scratch
  ConvFinishFn (*finish)(tt_activation activation, tt_dtype out_dtype);
};

// Defined in bitmap_conv2d_<isa>.cpp.
extern const ConvKernel kConvScalar, kConvAvx2, kConvAvx512;

}  // namespace trimtab
