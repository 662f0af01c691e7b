// bitmap_conv2d: the kept weights are decoded into taps once, then bands of images go over threads. A task
// pads and widens the rows of x that its band needs; no im2col matrix is ever stored.
#include "cpu/bitmap_conv2d.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/bitmap_kernels.h"
#include "cpu/conv2d_check.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/status.h"
#include "math/f32x1.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "bitmap_conv2d";
// The planes of a band: a part of an L2 that leaves room for taps and sums.
constexpr int64_t kBandBytes = int64_t(512) << 10;
// What one block of channels brings to one chunk of positions: half of an L1, or a little more.
constexpr int64_t kBlockBytes = int64_t(24) << 10;
constexpr int64_t kChunkVectors = 8;
constexpr int64_t kTileRows = 512;

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

SparseConv::SparseConv(const tt_conv2d& shape) : s(shape) {
  out_h = tt_conv2d_out_height(&s);
  out_w = tt_conv2d_out_width(&s);
  channels = s.channels / s.groups;
  outputs = s.out_channels / s.groups;
  K = channels * s.kernel_h * s.kernel_w;
  reach_h = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  width = out_w + (s.kernel_w - 1) * s.dilation_w / s.stride_w;
  phase_at.assign(size_t(s.stride_h * s.stride_w), -1);
  for (int64_t h = 0; h < s.kernel_h; ++h) {
    for (int64_t w = 0; w < s.kernel_w; ++w) {
      const int64_t phase =
          h * s.dilation_h % s.stride_h * s.stride_w + w * s.dilation_w % s.stride_w;
      if (phase_at[size_t(phase)] >= 0) continue;
      phase_at[size_t(phase)] = int32_t(phases.size());
      phases.push_back(int32_t(phase));
    }
  }
}

void SparseConv::cut(int64_t rows, int64_t outputs_a_tile, int64_t lanes) {
  tile_rows = outputs_a_tile;
  tiles = up(s.out_channels, tile_rows);
  bands = up(out_h, std::max<int64_t>(rows, 1));
  band_rows = up(out_h, bands);
  bands = up(out_h, band_rows);
  plane = (band_rows + reach_h) * width;
  const int64_t met = std::min(kChunkVectors * lanes + reach_h * width + width - out_w, plane);
  const int64_t bytes = int64_t(phases.size()) * met * 4;
  blocks = up(channels, std::max<int64_t>(kBlockBytes / bytes, 1));
  block_channels = up(channels, blocks);
  blocks = up(channels, block_channels);
}

int32_t SparseConv::offset(int64_t group, int64_t k) const {
  const int64_t taps = s.kernel_h * s.kernel_w, c = group * channels + k / taps;
  const int64_t h = k % taps / s.kernel_w * s.dilation_h, w = k % s.kernel_w * s.dilation_w;
  const int64_t phase = phase_at[size_t(h % s.stride_h * s.stride_w + w % s.stride_w)];
  return int32_t((c * int64_t(phases.size()) + phase) * plane + h / s.stride_h * width +
                 w / s.stride_w);
}

namespace {

struct Pass {
  const SparseConv& conv;
  const ConvKernel& kernel;
  const char* x;
  int64_t x_stride;  // bytes
  tt_dtype dtype;
  ConvTask task;  // planes, rows, outputs and out are each task's own
  ConvFinishFn finish;
  char* out;
  int64_t out_size;
};

struct Decoder {
  const SparseConv& conv;
  const tt_bitmap& w;
  const int32_t* offsets;  // [groups * K]
  int64_t* begin;  // first counts, one place on; then where each place begins
  ConvTap* taps;

  // each(place) of an output's blocks in turn, then body(word, k of its lowest bit) for the block's bits
  template <class Each, class Body>
  void each_block(int64_t n, Each&& each, Body&& body) const {
    const uint8_t* bits = w.bits + n * tt_bitmap_row_bytes(conv.K);
    const int64_t block_k = conv.block_channels * conv.s.kernel_h * conv.s.kernel_w;
    const int64_t first = conv.place(n, 0), step = conv.place(n, 1) - first;
    for (int64_t block = 0; block < conv.blocks; ++block) {
      each(first + block * step);
      const int64_t end = std::min((block + 1) * block_k, conv.K);
      for (int64_t k = block * block_k; k < end;) {
        const int64_t count = std::min(64 - k % 64, end - k);
        uint64_t word;
        std::memcpy(&word, bits + k / 64 * 8, 8);
        body(word >> k % 64 & ~uint64_t(0) >> (64 - count), k);
        k += count;
      }
    }
  }

  // No more taps than row_start gives the output room for.
  void count(int64_t n) const {
    int64_t room = w.row_start[n + 1] - w.row_start[n];
    int64_t* own = nullptr;
    each_block(
        n,
        [&](int64_t place) {
          own = begin + place + 1;
          *own = 0;
        },
        [&](uint64_t word, int64_t) {
          const int64_t here = std::min<int64_t>(__builtin_popcountll(word), room);
          *own += here;
          room -= here;
        });
  }

  template <class Value>
  void fill(int64_t n) const {
    const int32_t* own = offsets + n / conv.outputs * conv.K;
    const Value* from = static_cast<const Value*>(w.values) + w.row_start[n];
    const Value* end = static_cast<const Value*>(w.values) + w.row_start[n + 1];
    ConvTap* to = nullptr;
    each_block(
        n, [&](int64_t place) { to = taps + begin[place]; },
        [&](uint64_t word, int64_t k) {
          for (; word != 0 && from < end; word &= word - 1, ++from, ++to)
            *to = {F32x1::load(from).v, own[k + __builtin_ctzll(word)]};
        });
  }
};

void decode(const Decoder& decoder, const tt_parallel& pool, int threads) {
  const int64_t N = decoder.conv.s.out_channels, slices = std::min<int64_t>(threads, N);
  const auto each_output = [&](auto&& body) {
    parallel_run(pool, slices, [&](int64_t slice) {
      for (int64_t n = N * slice / slices; n < N * (slice + 1) / slices; ++n) body(n);
    });
  };
  each_output([&](int64_t n) { decoder.count(n); });
  decoder.begin[0] = 0;
  for (int64_t i = 0; i < N * decoder.conv.blocks; ++i) decoder.begin[i + 1] += decoder.begin[i];
  const tt_dtype dtype = decoder.w.dtype;
  if (dtype == TT_BF16) each_output([&](int64_t n) { decoder.fill<bf16>(n); });
  else if (dtype == TT_F16) each_output([&](int64_t n) { decoder.fill<fp16>(n); });
  else each_output([&](int64_t n) { decoder.fill<float>(n); });
}

// Taps and bias, in this thread's scratch; false: no memory for it.
bool prepare(const SparseConv& conv, const tt_bitmap& weight, const tt_epilogue& epilogue,
             const tt_parallel& pool, int threads, ConvTask* task) {
  const int64_t N = conv.s.out_channels, groups = conv.s.groups;
  ConvTap* taps = nullptr;
  int64_t* begin = nullptr;
  int32_t* offsets = nullptr;
  float* bias = nullptr;
  Carver carve;
  for (int cut = 0; cut < 2; ++cut) {
    if (cut == 1 && !carve.take(Scratch::kProduct)) return false;
    carve(taps, weight.count);
    carve(begin, N * conv.blocks + 1);
    carve(offsets, groups * conv.K);
    carve(bias, N);
  }
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t k = 0; k < conv.K; ++k) offsets[group * conv.K + k] = conv.offset(group, k);
  decode({conv, weight, offsets, begin, taps}, pool, threads);
  const bool own_bias = epilogue.bias == nullptr || epilogue.bias_dtype != TT_F32;
  if (own_bias) widen_bias(epilogue, N, bias);
  task->taps = taps;
  task->begin = begin;
  task->bias = own_bias ? bias : static_cast<const float*>(epilogue.bias);
  return true;
}

// The rows of one plane: those beyond the image, and what lies beside it, are zeros.
void fill_plane(const Pass& pass, const char* x, int64_t phase, int64_t first_row, int64_t rows,
                float* to) {
  const tt_conv2d& s = pass.conv.s;
  const int64_t size = dtype_size(pass.dtype), width = pass.conv.width;
  const int64_t above = s.pad_top - phase / s.stride_w, before = s.pad_left - phase % s.stride_w;
  // Columns q with 0 <= q * stride_w - before < image's width.
  const int64_t begin = std::min(before > 0 ? up(before, s.stride_w) : 0, width);
  const int64_t end = std::min(std::max(up(s.width + before, s.stride_w), begin), width);
  for (int64_t row = first_row; row < first_row + rows; ++row, to += width) {
    const int64_t h = row * s.stride_h - above;
    const bool inside = h >= 0 && h < s.height;
    const int64_t from = inside ? begin : width;
    std::fill(to, to + from, 0.0f);
    if (!inside) continue;
    pass.kernel.widen(x + (h * s.width + from * s.stride_w - before) * size, pass.dtype, s.stride_w,
                      end - from, to + from);
    std::fill(to + end, to + width, 0.0f);
  }
}

void fill_band(const Pass& pass, int64_t image, int64_t band, float* planes) {
  const SparseConv& conv = pass.conv;
  const int64_t first = band * conv.band_rows;
  const int64_t rows = std::min(conv.band_rows, conv.out_h - first) + conv.reach_h;
  const char* x = pass.x + image * pass.x_stride;
  const int64_t channel_bytes = conv.s.height * conv.s.width * dtype_size(pass.dtype);
  for (int64_t c = 0; c < conv.s.channels; ++c, x += channel_bytes)
    for (const int32_t phase : conv.phases) {
      fill_plane(pass, x, phase, first, rows, planes);
      // Below a shorter last band, as in the slack: what is read for positions that nobody wants should be
      // no subnormal, which would be slow.
      std::fill(planes + rows * conv.width, planes + conv.plane, 0.0f);
      planes += conv.plane;
    }
  std::fill(planes, planes + SparseConv::kSlack, 0.0f);
}

// Tasks are (image, band, tile); false: no memory for scratch.
bool run_tasks(const Pass& pass, int64_t thread, Shares& shares) {
  const SparseConv& conv = pass.conv;
  int64_t filled = -1;
  float* planes = nullptr;
  for (int64_t index; (index = shares.take(thread)) >= 0;) {
    const int64_t at = index / conv.tiles, tile = index % conv.tiles;
    const int64_t image = at / conv.bands, band = at % conv.bands;
    if (filled != at) {
      planes = static_cast<float*>(thread_scratch(conv.plane_floats() * 4, Scratch::kImages));
      if (planes == nullptr) return false;
      fill_band(pass, image, band, planes);
      filled = at;
    }
    ConvTask task = pass.task;
    const int64_t N = conv.s.out_channels, first = band * conv.band_rows;
    task.planes = planes;
    task.n_begin = tile * conv.tile_rows;
    task.n_end = std::min(task.n_begin + conv.tile_rows, N);
    task.rows = std::min(conv.band_rows, conv.out_h - first);
    task.out = pass.out + ((image * N * conv.out_h + first) * conv.out_w) * pass.out_size;
    if (!pass.kernel.run(task, pass.finish)) return false;
  }
  return true;
}

// Bands whose planes stay in L2; where that gives too few tasks for the threads, shorter bands while they
// are long enough to fill chunks, and then smaller tiles.
void plan(SparseConv& conv, int64_t lanes, int threads) {
  const int64_t line = conv.s.channels * int64_t(conv.phases.size()) * conv.width * 4;
  int64_t rows = std::max(kBandBytes / line - conv.reach_h, conv.reach_h + 1);
  const int64_t wanted = threads == 1 ? 1 : 2 * threads;
  const int64_t images = std::max<int64_t>(conv.s.batch, 1);
  if (images * up(conv.out_h, rows) < wanted) {
    const int64_t least = std::max(up(2 * kChunkVectors * lanes, conv.width), 2 * conv.reach_h);
    rows = std::min(rows, std::max(up(conv.out_h, up(wanted, images)), least));
  }
  const int64_t N = conv.s.out_channels;
  const int64_t parts = std::min(up(wanted, images * up(conv.out_h, rows)), N);
  conv.cut(rows, std::min(up(N, parts), kTileRows), lanes);
}

tt_status check_weight(const SparseConv& conv, const tt_bitmap* weight, tt_dtype x_dtype) {
  const int64_t N = conv.s.out_channels;
  if (weight == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: weight is NULL", kOp);
  if (weight->dtype != x_dtype)
    return set_error(TT_INVALID_ARGUMENT, "%s: expected x and values of one float dtype", kOp);
  if (weight->count < 0 || (weight->count > 0 && weight->values == nullptr) ||
      weight->row_start == nullptr || weight->bits == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "%s: values, bits or row_start is NULL", kOp);
  }
  if (weight->row_start[0] != 0 || weight->row_start[N] != weight->count) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected row_start from 0 to the %lld values, got %lld to %lld", kOp,
                     (long long)weight->count, (long long)weight->row_start[0],
                     (long long)weight->row_start[N]);
  }
  for (int64_t n = 0; n < N; ++n) {
    if (weight->row_start[n + 1] >= weight->row_start[n]) continue;
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected row_start to rise, got row_start[%lld] = %lld after %lld", kOp,
                     (long long)n + 1, (long long)weight->row_start[n + 1],
                     (long long)weight->row_start[n]);
  }
  return TT_OK;
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_bitmap_conv2d(const tt_conv2d* shape, const void* x, tt_dtype x_dtype,
                           int64_t x_stride, const tt_bitmap* weight, const tt_epilogue* epilogue,
                           const tt_parallel* parallel) {
  tt_status status = check_conv2d(kOp, shape, x, x_dtype);
  if (status != TT_OK) return status;
  SparseConv conv(*shape);
  const int64_t N = shape->out_channels, pixels = conv.out_h * conv.out_w;
  status = check_weight(conv, weight, x_dtype);
  if (status != TT_OK) return status;
  tt_epilogue into = epilogue != nullptr ? *epilogue : tt_epilogue{};
  into.out_stride = N;
  status = check_sparse_epilogue(kOp, epilogue != nullptr ? &into : nullptr, false,
                                 shape->batch * pixels, N);
  tt_isa isa;
  if (status == TT_OK) status = current_isa(&isa);
  if (status != TT_OK || shape->batch == 0) return status;

  const ConvKernel& kernel = isa >= TT_ISA_AVX512   ? kConvAvx512
                             : isa == TT_ISA_SCALAR ? kConvScalar
                                                    : kConvAvx2;
  const tt_parallel pool = pool_or_serial(parallel);
  // Multiply-adds at a rate a core reaches, against what waking threads costs in ns.
  const double macs_a_ns = isa == TT_ISA_SCALAR ? 1 : isa < TT_ISA_AVX512 ? 10 : 30;
  const bool many =
      pool.run != nullptr && double(shape->batch * pixels) * weight->count > 4000 * macs_a_ns;
  const int threads = many ? pool.threads : 1;
  plan(conv, kernel.lanes, threads);
  if (conv.plane_floats() > INT32_MAX) {
    return set_error(TT_UNSUPPORTED,
                     "%s: expected rows of %lld channels that fit 8 GiB, got %lld bytes", kOp,
                     (long long)shape->channels, (long long)conv.plane_floats() * 4);
  }

  ConvTask task{&conv, nullptr, nullptr, nullptr, nullptr, 0, 0, 0, nullptr};
  if (!prepare(conv, *weight, into, many ? pool : tt_parallel{nullptr, nullptr, 1}, threads, &task))
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch", kOp);
  Pass pass{conv,
            kernel,
            static_cast<const char*>(x),
            x_stride * dtype_size(x_dtype),
            x_dtype,
            task,
            kernel.finish(into.activation, into.out_dtype),
            static_cast<char*>(into.out),
            dtype_size(into.out_dtype)};
  Shares shares(shape->batch * conv.bands * conv.tiles, threads);
  std::atomic<bool> done{true};
  parallel_run(pool, shares.count, [&](int64_t thread) {
    if (!run_tasks(pass, thread, shares)) done.store(false, std::memory_order_relaxed);
  });
  if (!done.load())
    return set_error(TT_OUT_OF_MEMORY, "%s: no memory for scratch in a thread", kOp);
  return TT_OK;
}
