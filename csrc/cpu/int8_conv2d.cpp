// int8_conv2d: images are quantized once into padded int8 [H][W][C]; the product then takes patches of
// them as its rows, gathered straight into the activation panels. No im2col matrix is ever stored.
#include <trimtab/int8_conv2d.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/conv2d_check.h"
#include "cpu/int8_conv2d.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/status.h"
#include "math/dtypes.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_conv2d";

// Images of one round: int8 copies and channels-first results of more would leave the caches.
constexpr int64_t kRoundBytes = int64_t(8) << 20;
// Patches of one product, in bytes: half the L2 of two cores. More would leave it between the gather
// and the multiplication.
constexpr int64_t kSliceBytes = int64_t(2) << 20;
// Below this many multiply-adds and elements, waking threads costs more than it gives.
constexpr int64_t kParallelWork = 64 * 1024;

struct Patches {
  const Conv* conv;
  const int8_t* q;  // the first image, at the group's first channel
  const float* scale;  // [images]
  int64_t row;  // of the slice that is multiplied now
  int64_t segment;  // a patch is gathered in copies of `segment` bytes ...
  std::vector<int64_t> offset;  // ... from these offsets
};

// Copies 16 bytes at a time and up to 15 too many: both buffers have room for them, and what lands
// too far is overwritten by the next segment.
inline void copy_segment(int8_t* to, const int8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16) std::memcpy(to + i, from + i, 16);
}

// Calls run(first row, rows, address of its patch) for stretches of rows within one output line.
template <class F>
void each_line(const Patches& p, int64_t m, int rows, float* scale, F&& run) {
  const Conv& conv = *p.conv;
  for (int r = 0; r < rows;) {
    const int64_t at = p.row + m + r, line = at / conv.out_w, j = at % conv.out_w;
    const int64_t image = line / conv.out_h, i = line % conv.out_h;
    const int count = int(std::min<int64_t>(rows - r, conv.out_w - j));
    std::fill(scale + r, scale + r + count, p.scale[image]);
    run(r, count,
        p.q + image * conv.image_bytes + i * conv.shape.stride_h * conv.line_bytes +
            j * conv.shape.stride_w * conv.shape.channels);
    r += count;
  }
}

// Segments that fill whole panel steps go to the panel directly.
void fill_direct(const void* self, const Int8Kernel& kernel, int64_t m, int rows, void* panel,
                 float* scale) {
  const Patches& p = *static_cast<const Patches*>(self);
  const int64_t x_stride = p.conv->shape.stride_w * p.conv->shape.channels;
  const int64_t row_bytes = kStepK * kernel.a_cell;
  const int64_t segment_bytes = p.segment / kStepK * kernel.mr * row_bytes;
  each_line(p, m, rows, scale, [&](int r, int count, const int8_t* patch) {
    char* to = static_cast<char*>(panel) + r * row_bytes;
    for (const int64_t offset : p.offset) {
      kernel.pack_a(patch + offset, x_stride, count, p.segment, to);
      to += segment_bytes;
    }
  });
}

void fill_gathered(const void* self, const Int8Kernel& kernel, int64_t m, int rows, void* panel,
                   float* scale) {
  const Patches& p = *static_cast<const Patches*>(self);
  const int64_t K = p.conv->K, x_stride = p.conv->shape.stride_w * p.conv->shape.channels;
  int8_t* gathered = static_cast<int8_t*>(thread_scratch(kernel.mr * K + 16, Scratch::kPatches));
  if (gathered == nullptr) {  // no way to fail from here: the rows come out NaN and are seen
    std::fill(scale, scale + rows, float_from_bits(0x7fc00000u));
    return;
  }
  int8_t* to = gathered;
  each_line(p, m, rows, scale, [&](int, int count, const int8_t* patch) {
    for (int i = 0; i < count; ++i, patch += x_stride) {
      for (const int64_t offset : p.offset) {
        copy_segment(to, patch + offset, p.segment);
        to += p.segment;
      }
    }
  });
  kernel.pack_a(gathered, K, rows, K, panel);
}

// The longest stretches in which a patch is contiguous: a line of the kernel if neither dilation nor
// groups break it, else a tap.
void plan_segments(const Conv& conv, Patches* patches) {
  const tt_conv2d& s = conv.shape;
  const int64_t tap = conv.channels;
  const bool whole_line = conv.groups == 1 && (s.dilation_w == 1 || s.kernel_w == 1);
  patches->segment = whole_line ? s.kernel_w * tap : tap;
  for (int64_t kh = 0; kh < s.kernel_h; ++kh)
    for (int64_t kw = 0; kw < (whole_line ? 1 : s.kernel_w); ++kw)
      patches->offset.push_back(kh * s.dilation_h * conv.line_bytes +
                                kw * s.dilation_w * s.channels);
}

tt_status run_groups(const Conv& conv, const Images& images, const int8_t* b_packed,
                     const tt_epilogue& epilogue, const tt_parallel* parallel) {
  const tt_conv2d& s = conv.shape;
  const int64_t N = conv.outputs, rows = images.count * conv.out_h * conv.out_w;
  const int64_t group_bytes = round_up(N, kPanelN) / kPanelN * packed_panel_bytes(conv.K);
  Patches patches{&conv, images.q, images.scale, 0, 0, {}};
  plan_segments(conv, &patches);
  const bool direct = patches.segment % kStepK == 0 || patches.offset.size() == 1;
  const RowSource source{direct ? fill_direct : fill_gathered, &patches};
  const int64_t slice = std::max<int64_t>(kSliceBytes / round_up(conv.K, kStepK) / 64 * 64, 64);
  for (int64_t g = 0; g < conv.groups; ++g) {
    tt_epilogue part = epilogue;
    part.b_scale += g * N;
    if (part.bias != nullptr)
      part.bias = static_cast<const char*>(part.bias) + g * N * dtype_size(part.bias_dtype);
    patches.q = images.q + g * conv.channels;
    const int64_t size = dtype_size(part.out_dtype);
    char* out = static_cast<char*>(part.out) + g * N * size;
    for (patches.row = 0; patches.row < rows; patches.row += slice) {
      part.out = out + patches.row * s.out_channels * size;
      const tt_status status =
          run_product(kOp, source, b_packed + g * group_bytes, std::min(slice, rows - patches.row),
                      N, conv.K, part, parallel);
      if (status != TT_OK) return status;
    }
  }
  return TT_OK;
}

float bias_at(const tt_epilogue& epilogue, int64_t n) {
  if (epilogue.bias == nullptr) return -0.0f;  // t + -0.0 is t for every t
  if (epilogue.bias_dtype == TT_BF16) return to_float(static_cast<const bf16*>(epilogue.bias)[n]);
  if (epilogue.bias_dtype == TT_F16) return to_float(static_cast<const fp16*>(epilogue.bias)[n]);
  return static_cast<const float*>(epilogue.bias)[n];
}

// Tables of a depthwise convolution, the same for every image.
struct Depthwise {
  int64_t taps = 0;  // rounded up to even
  std::vector<int64_t> offset;  // [taps]
  std::vector<int16_t>
      weight;  // [channel blocks][taps][kDepthwiseChannels], zeros where there is none
  std::vector<float> bias;  // [O]

  Depthwise(const Conv& conv, const int8_t* packed, const tt_epilogue& epilogue) {
    const tt_conv2d& s = conv.shape;
    const int64_t O = s.out_channels, blocks = (O + kDepthwiseChannels - 1) / kDepthwiseChannels;
    taps = round_up(conv.K, 2);
    offset.assign(size_t(taps), 0);
    weight.assign(size_t(blocks * taps * kDepthwiseChannels), 0);
    for (int64_t t = 0; t < conv.K; ++t) {
      offset[size_t(t)] = t / s.kernel_w * s.dilation_h * conv.line_bytes +
                          t % s.kernel_w * s.dilation_w * s.channels;
      for (int64_t o = 0; o < O; ++o) {
        const int64_t block = o / kDepthwiseChannels;
        weight[size_t((block * taps + t) * kDepthwiseChannels + o % kDepthwiseChannels)] =
            packed[t * O + o];
      }
    }
    for (int64_t o = 0; o < O; ++o) bias.push_back(bias_at(epilogue, o));
  }
};

// One output line.
void depthwise_line(const Conv& conv, const Images& images, const Depthwise& tables,
                    const ConvLanes& lanes, EpilogueFn scale_and_store, const tt_epilogue& epilogue,
                    int64_t line) {
  const tt_conv2d& s = conv.shape;
  const int64_t image = line / conv.out_h, i = line % conv.out_h, O = s.out_channels;
  alignas(64) int32_t acc[kDepthwisePixels * kMaxTileN];
  float scale[kDepthwisePixels];
  std::fill(scale, scale + kDepthwisePixels, images.scale[image]);
  const int64_t size = dtype_size(epilogue.out_dtype);
  char* out = static_cast<char*>(epilogue.out) + line * conv.out_w * O * size;
  DepthwiseRun run{nullptr, s.stride_w * s.channels, tables.offset.data(), nullptr, tables.taps, 0,
                   acc};
  for (int64_t j = 0; j < conv.out_w; j += kDepthwisePixels) {
    run.pixels = std::min(kDepthwisePixels, conv.out_w - j);
    const int8_t* x =
        images.q + image * conv.image_bytes + i * s.stride_h * conv.line_bytes + j * run.x_stride;
    for (int64_t c = 0; c < O; c += kDepthwiseChannels) {
      run.x = x + c;
      run.weight = tables.weight.data() + c * tables.taps;
      lanes.depthwise(run);
      scale_and_store(acc, kMaxTileN, int(run.pixels), int(std::min(kDepthwiseChannels, O - c)),
                      scale, epilogue.b_scale + c, tables.bias.data() + c, 0.0f,
                      out + (j * O + c) * size, O);
    }
  }
}

void run_depthwise(const Conv& conv, const Images& images, const Depthwise& tables, tt_isa isa,
                   const tt_epilogue& epilogue, const tt_parallel& pool) {
  const ConvLanes& lanes = conv_lanes(isa);
  const EpilogueFn store =
      int8_kernel(isa, 64, 0).epilogue(epilogue.activation, epilogue.out_dtype);
  const int64_t lines = images.count * conv.out_h;
  const int64_t line_work = conv.out_w * conv.shape.out_channels * conv.K;
  const int64_t lines_a_task =
      std::max<int64_t>(kParallelWork / std::max<int64_t>(line_work, 1), 1);
  parallel_run(pool, (lines + lines_a_task - 1) / lines_a_task, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * lines_a_task, lines);
    for (int64_t line = task * lines_a_task; line < end; ++line)
      depthwise_line(conv, images, tables, lanes, store, epilogue, line);
  });
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_conv2d(const tt_conv2d* shape, const void* x, tt_dtype x_dtype, int64_t x_stride,
                         int32_t x_channels_last, const int8_t* b_packed,
                         const tt_epilogue* epilogue, int32_t out_channels_last,
                         const tt_parallel* parallel) {
  tt_status status = check_conv2d(kOp, shape, x, x_dtype);
  if (status != TT_OK) return status;
  const Conv conv(*shape);
  const int64_t O = shape->out_channels, pixels = conv.out_h * conv.out_w;
  tt_epilogue into = epilogue != nullptr ? *epilogue : tt_epilogue{};
  into.out_stride = O;
  status = check_product(kOp, shape->batch * pixels, O, conv.K, b_packed,
                         epilogue != nullptr ? &into : nullptr);
  tt_isa isa;
  if (status == TT_OK) status = current_isa(&isa);
  if (status != TT_OK || shape->batch == 0) return status;

  // Scratch of a round: int8 images, their scales and working floats, and the result's rows if they
  // must be turned around.
  const int64_t out_size = dtype_size(into.out_dtype), row_bytes = pixels * O * out_size;
  const bool turn = !out_channels_last && O > 1 && pixels > 1;
  const int64_t floats = 1 + image_work(conv);
  const int64_t bytes = conv.image_bytes + floats * 4 + (turn ? row_bytes : 0);
  const int64_t count = std::min(std::max<int64_t>(kRoundBytes / bytes, 1), shape->batch);
  const int64_t float_bytes = round_up(count * floats * 4, 64);
  char* scratch = static_cast<char*>(
      thread_scratch(count * bytes + float_bytes + kImageSlack + 64, Scratch::kImages));
  if (scratch == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch", kOp,
                     (long long)(count * bytes));
  }
  float* scale = reinterpret_cast<float*>(scratch);
  int8_t* q = reinterpret_cast<int8_t*>(scratch + float_bytes);
  char* rows = scratch + float_bytes + round_up(count * conv.image_bytes + kImageSlack, 64);

  const int64_t work = std::max(shape->channels * shape->height * shape->width, pixels * O);
  const bool serial = parallel == nullptr || shape->batch * work < kParallelWork;
  const tt_parallel pool = serial ? tt_parallel{nullptr, nullptr, 1} : *parallel;
  const std::unique_ptr<Depthwise> tables(conv.depthwise ? new Depthwise(conv, b_packed, into)
                                                         : nullptr);
  for (int64_t b = 0; b < shape->batch && status == TT_OK; b += count) {
    const Images images{static_cast<const char*>(x) + b * x_stride * dtype_size(x_dtype),
                        x_stride * dtype_size(x_dtype),
                        x_dtype,
                        x_channels_last != 0,
                        std::min(count, shape->batch - b),
                        q,
                        scale,
                        scale + count};
    quantize_images(conv, images, isa, pool);
    char* out = static_cast<char*>(epilogue->out) + b * row_bytes;
    into.out = turn ? rows : out;
    if (conv.depthwise) {
      run_depthwise(conv, images, *tables, isa, into, pool);
    } else {
      status = run_groups(conv, images, b_packed, into, parallel);
    }
    if (turn && status == TT_OK)
      channels_first(rows, out, images.count, pixels, O, int(out_size), pool);
  }
  return status;
}
