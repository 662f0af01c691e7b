// The parts of int8_conv2d: images become padded int8 [H][W][C], patches of them become the product's
// rows, depthwise convolutions go their own way.
#pragma once
#include <trimtab/int8_conv2d.h>

#include "cpu/int8_kernels.h"

namespace trimtab {

// A convolution with everything its parts derive from it.
struct Conv {
  tt_conv2d shape;
  int64_t out_h, out_w;
  int64_t line_bytes;  // a line of a padded int8 image: (W + padding) * C
  int64_t image_bytes;  // a padded image, rounded up to 64
  bool depthwise;  // C = O = groups
  // Neighbouring groups are merged while their outputs fit one weight panel of 16, which they would
  // fill up with zeros alone as well: a block-diagonal weight of the same size, and as many fewer
  // passes over the images.
  int64_t merged, groups;  // how many a merged group holds; how many are left
  int64_t channels, outputs;  // of a merged group
  int64_t K;  // of a merged group: channels * kernel_h * kernel_w
  explicit Conv(const tt_conv2d& shape);
  bool padded() const {
    return shape.pad_top + shape.pad_bottom + shape.pad_left + shape.pad_right > 0;
  }
};

// Bytes that may be read past the last image: the gather copies 16 at a time, depthwise reads 32.
constexpr int64_t kImageSlack = 64;

struct Images {
  const char* x;  // the first image
  int64_t x_stride;  // bytes from one image to the next
  tt_dtype dtype;
  bool channels_last;
  int64_t count;
  int8_t* q;  // [count] padded images [H][W][C], conv.image_bytes apart
  float* scale;  // [count]
  float* work;  // [count * image_work(conv)]
};

// Floats of working memory that quantize_images needs an image.
int64_t image_work(const Conv& conv);

// x -> q and scale: quantize_int8 of each image as one row, zeros around it.
void quantize_images(const Conv& conv, const Images& images, tt_isa isa, const tt_parallel& pool);

// rows [count][pixels][channels] -> out [count][channels][pixels], elements of 2 or 4 bytes
void channels_first(const void* rows, void* out, int64_t count, int64_t pixels, int64_t channels,
                    int element_size, const tt_parallel& pool);

// 32 channels of `pixels` neighbouring outputs of a depthwise convolution.
struct DepthwiseRun {
  const int8_t* x;  // the first output's patch, at the first channel
  int64_t x_stride;  // bytes from one output's patch to the next one's
  const int64_t* offset;  // [taps] of a tap from the patch's start
  const int16_t* weight;  // [taps][kDepthwiseChannels]
  int64_t taps;  // even
  int64_t pixels;
  int32_t* acc;  // [pixels][kMaxTileN]
};
constexpr int64_t kDepthwiseChannels = 32;
constexpr int64_t kDepthwisePixels = 32;  // of one run at most: acc stays in L1

struct ConvLanes {
  // The largest bit pattern of |x|, x [n].
  float (*absmax)(const void* x, tt_dtype dtype, int64_t n);
  // q = rne(x * inverse), x [n]; zeros if inverse is 0
  void (*quantize)(const void* x, tt_dtype dtype, int64_t n, float inverse, int8_t* q);
  void (*depthwise)(const DepthwiseRun& run);
};
extern const ConvLanes conv_lanes_scalar, conv_lanes_avx2, conv_lanes_avx512;

inline const ConvLanes& conv_lanes(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return conv_lanes_avx512;
  return isa == TT_ISA_SCALAR ? conv_lanes_scalar : conv_lanes_avx2;
}

}  // namespace trimtab
