// Images on their way in and out of int8_conv2d: quantized to padded int8 [H][W][C], and results
// transposed to [O][H][W] for callers that keep channels first.
#include <emmintrin.h>  // SSE2, which every x86-64 has

#include <algorithm>
#include <cstring>

#include "cpu/int8_conv2d.h"
#include "cpu/int8_product.h"
#include "cpu/parallel.h"
#include "math/quantize.h"

namespace trimtab {
namespace {

// Pixels of one task in channels-first order: their offsets and 16 channels of them stay in L1.
constexpr int64_t kPixels = 256;
// Elements of one task where memory is walked in order.
constexpr int64_t kElements = 65536;

// bytes[16][stride] -> 16 rows of 16: four rounds of interleaving halves, quarters, ... with their
// counterparts turn row r, column c into row c, column r.
inline void transpose_16x16(const int8_t* from, int64_t stride, __m128i row[16]) {
  __m128i a[16];
  for (int i = 0; i < 16; ++i)
    a[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      row[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      row[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 16; ++i) a[i] = row[i];
  }
}

struct Job {
  const Conv& conv;
  const Images& images;
  const ConvLanes& lanes;
  const float* inverse;  // [count]
};

int8_t* inside(const Job& job, int64_t image) {
  const tt_conv2d& s = job.conv.shape;
  return job.images.q + image * job.conv.image_bytes + s.pad_top * job.conv.line_bytes +
         s.pad_left * s.channels;
}

void zero_border(const Conv& conv, int8_t* image) {
  const tt_conv2d& s = conv.shape;
  const int64_t left = s.pad_left * s.channels, right = s.pad_right * s.channels;
  std::memset(image, 0, size_t(s.pad_top * conv.line_bytes));
  int8_t* line = image + s.pad_top * conv.line_bytes;
  for (int64_t h = 0; h < s.height; ++h, line += conv.line_bytes) {
    std::memset(line, 0, size_t(left));
    std::memset(line + conv.line_bytes - right, 0, size_t(right));
  }
  std::memset(line, 0, size_t(s.pad_bottom * conv.line_bytes));
}

// Lines [begin, end) of an image [H][W][C].
void quantize_lines(const Job& job, int64_t image, int64_t begin, int64_t end) {
  const tt_conv2d& s = job.conv.shape;
  const int64_t line = s.width * s.channels, size = dtype_size(job.images.dtype);
  const char* from = job.images.x + image * job.images.x_stride + begin * line * size;
  int8_t* to = inside(job, image) + begin * job.conv.line_bytes;
  const float inverse = job.inverse[image];
  if (!job.conv.padded()) {
    job.lanes.quantize(from, job.images.dtype, (end - begin) * line, inverse, to);
    return;
  }
  for (int64_t h = begin; h < end; ++h, from += line * size, to += job.conv.line_bytes)
    job.lanes.quantize(from, job.images.dtype, line, inverse, to);
}

// Pixels [begin, end) of an image [C][H][W], at most kPixels: 16 channels at a time are quantized side
// by side and transposed in blocks of 16 x 16.
void quantize_pixels(const Job& job, int64_t image, int64_t begin, int64_t end) {
  const tt_conv2d& s = job.conv.shape;
  const int64_t plane = s.height * s.width, size = dtype_size(job.images.dtype);
  int64_t offset[kPixels];
  for (int64_t p = begin, h = begin / s.width, w = begin % s.width; p < end; ++p) {
    offset[p - begin] = h * job.conv.line_bytes + w * s.channels;
    if (++w == s.width) w = 0, ++h;
  }
  const char* x = job.images.x + image * job.images.x_stride + begin * size;
  int8_t* q = inside(job, image);
  alignas(16) int8_t side[16 * kPixels];
  for (int64_t c = 0; c < s.channels; c += 16) {
    const int64_t channels = std::min<int64_t>(16, s.channels - c);
    for (int64_t i = 0; i < channels; ++i) {
      job.lanes.quantize(x + (c + i) * plane * size, job.images.dtype, end - begin,
                         job.inverse[image], side + i * kPixels);
    }
    for (int64_t p = 0; p < end - begin; p += 16) {
      __m128i row[16];
      transpose_16x16(side + p, kPixels, row);
      const int64_t pixels = std::min<int64_t>(16, end - begin - p);
      for (int64_t i = 0; i < pixels; ++i) {
        int8_t* to = q + offset[p + i] + c;
        if (channels == 16) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), row[i]);
        } else {
          std::memcpy(to, &row[i], size_t(channels));
        }
      }
    }
  }
}

// [pixels][channels] -> [channels][pixels] in 4-byte elements, one 16-byte square at a time.
struct Square4 {
  static constexpr int64_t kSide = 4;
  static void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to,
                        int64_t to_stride) {
    __m128i a[4];
    for (int i = 0; i < 4; ++i)
      a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
    const __m128i b0 = _mm_unpacklo_epi32(a[0], a[2]), b1 = _mm_unpackhi_epi32(a[0], a[2]);
    const __m128i b2 = _mm_unpacklo_epi32(a[1], a[3]), b3 = _mm_unpackhi_epi32(a[1], a[3]);
    const __m128i rows[4] = {_mm_unpacklo_epi32(b0, b2), _mm_unpackhi_epi32(b0, b2),
                             _mm_unpacklo_epi32(b1, b3), _mm_unpackhi_epi32(b1, b3)};
    for (int i = 0; i < 4; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), rows[i]);
  }
};

struct Square2 {
  static constexpr int64_t kSide = 8;
  static void transpose(const uint16_t* from, int64_t from_stride, uint16_t* to,
                        int64_t to_stride) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; ++i)
      a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
    for (int round = 0; round < 3; ++round) {
      for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
      }
      for (int i = 0; i < 8; ++i) a[i] = b[i];
    }
    for (int i = 0; i < 8; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), a[i]);
  }
};

// Pixels [begin, end) of one image; a channel's 16 pixels fill a cache line before the next channel.
template <class Square, class T>
void transpose_pixels(const T* from, T* to, int64_t begin, int64_t end, int64_t pixels,
                      int64_t channels) {
  constexpr int64_t kSide = Square::kSide;
  for (int64_t p = begin; p < end; p += 16) {
    const int64_t p_end = std::min(p + 16, end);
    const int64_t p_whole = p + (p_end - p) / kSide * kSide;
    int64_t c = 0;
    for (; c + kSide <= channels; c += kSide) {
      for (int64_t i = p; i < p_whole; i += kSide)
        Square::transpose(from + i * channels + c, channels, to + c * pixels + i, pixels);
      for (int64_t j = c; j < c + kSide; ++j)
        for (int64_t i = p_whole; i < p_end; ++i) to[j * pixels + i] = from[i * channels + j];
    }
    for (; c < channels; ++c)
      for (int64_t i = p; i < p_end; ++i) to[c * pixels + i] = from[i * channels + c];
  }
}

int64_t absmax_chunks(const Conv& conv) {
  const tt_conv2d& s = conv.shape;
  return (s.height * s.width * s.channels + kElements - 1) / kElements;
}

}  // namespace

int64_t image_work(const Conv& conv) { return absmax_chunks(conv) + 1; }

void quantize_images(const Conv& conv, const Images& images, tt_isa isa, const tt_parallel& pool) {
  const tt_conv2d& s = conv.shape;
  const int64_t pixels = s.height * s.width, n = pixels * s.channels;
  const int64_t size = dtype_size(images.dtype);
  const int64_t chunks = absmax_chunks(conv);
  float* most = images.work;
  const ConvLanes& lanes = conv_lanes(isa);

  parallel_run(pool, images.count * chunks, [&](int64_t task) {
    const int64_t image = task / chunks, at = task % chunks * kElements;
    most[task] = lanes.absmax(images.x + image * images.x_stride + at * size, images.dtype,
                              std::min(kElements, n - at));
    if (at == 0 && conv.padded()) zero_border(conv, images.q + image * conv.image_bytes);
  });
  float* inverse = most + images.count * chunks;
  for (int64_t image = 0; image < images.count; ++image) {
    uint32_t bits = 0;  // as an integer: NaN and Inf stay on top
    for (int64_t i = 0; i < chunks; ++i)
      bits = std::max(bits, float_bits(most[image * chunks + i]));
    const RowScale row = row_scale(float_from_bits(bits));
    images.scale[image] = row.scale;
    inverse[image] = row.inverse;
  }

  const Job job{conv, images, lanes, inverse};
  if (images.channels_last) {
    const int64_t lines =
        std::max<int64_t>(kElements / std::max<int64_t>(s.width * s.channels, 1), 1);
    const int64_t tasks = (s.height + lines - 1) / lines;
    parallel_run(pool, images.count * tasks, [&](int64_t task) {
      const int64_t begin = task % tasks * lines;
      quantize_lines(job, task / tasks, begin, std::min(begin + lines, s.height));
    });
    return;
  }
  const int64_t tasks = (pixels + kPixels - 1) / kPixels;
  parallel_run(pool, images.count * tasks, [&](int64_t task) {
    const int64_t begin = task % tasks * kPixels;
    quantize_pixels(job, task / tasks, begin, std::min(begin + kPixels, pixels));
  });
}

void channels_first(const void* rows, void* out, int64_t count, int64_t pixels, int64_t channels,
                    int element_size, const tt_parallel& pool) {
  const int64_t block = std::max<int64_t>(kElements / channels / 16 * 16, 16);
  const int64_t tasks = (pixels + block - 1) / block;
  parallel_run(pool, count * tasks, [&](int64_t task) {
    const int64_t begin = task % tasks * block, end = std::min(begin + block, pixels);
    const int64_t image = task / tasks * pixels * channels;
    if (element_size == 4) {
      transpose_pixels<Square4>(static_cast<const uint32_t*>(rows) + image,
                                static_cast<uint32_t*>(out) + image, begin, end, pixels, channels);
    } else {
      transpose_pixels<Square2>(static_cast<const uint16_t*>(rows) + image,
                                static_cast<uint16_t*>(out) + image, begin, end, pixels, channels);
    }
  });
}

}  // namespace trimtab
