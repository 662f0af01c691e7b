// The packed weight of int8_conv2d: K runs over (kh, kw, c), so that a patch of an [H][W][C] image is
// gathered in long copies; groups follow each other and share the tail.
#include <trimtab/int8_pack.h>

#include <cstring>

#include "cpu/int8_conv2d.h"
#include "cpu/scratch.h"
#include "cpu/status.h"

namespace trimtab {

// Rows of a merged group stay shorter than this, so that the zeros in them stay cheap to gather.
constexpr int64_t kMaxMergedK = 2048;

Conv::Conv(const tt_conv2d& s) : shape(s) {
  out_h = tt_conv2d_out_height(&s);
  out_w = tt_conv2d_out_width(&s);
  line_bytes = (s.width + s.pad_left + s.pad_right) * s.channels;
  image_bytes = round_up((s.height + s.pad_top + s.pad_bottom) * line_bytes, 64);
  depthwise = s.channels == s.groups && s.out_channels == s.groups;
  const int64_t own_outputs = s.out_channels / s.groups, own_channels = s.channels / s.groups;
  const int64_t taps = s.kernel_h * s.kernel_w;
  merged = 1;
  for (int64_t m = 2; !depthwise && m <= s.groups && m * own_outputs <= kPanelN; ++m)
    if (s.groups % m == 0 && m * own_channels * taps <= kMaxMergedK) merged = m;
  groups = s.groups / merged;
  channels = merged * own_channels;
  outputs = merged * own_outputs;
  K = channels * taps;
}

namespace {

int64_t out_size(int64_t size, int64_t padding, int64_t dilation, int64_t kernel, int64_t stride) {
  const int64_t room = size + padding - dilation * (kernel - 1) - 1;
  return room < 0 || stride < 1 ? 0 : room / stride + 1;
}

tt_status check_weight(const char* op, const tt_conv2d* s, const void* w, const void* packed) {
  if (s == nullptr || s->out_channels < 1 || s->channels < 1 || s->groups < 1 || s->kernel_h < 1 ||
      s->kernel_w < 1 || s->channels % s->groups != 0 || s->out_channels % s->groups != 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected sizes >= 1, and channels that groups divide", op);
  }
  if (w == nullptr || packed == nullptr ||
      reinterpret_cast<uintptr_t>(packed) % TT_INT8_PACK_ALIGNMENT != 0) {
    return set_error(TT_INVALID_ARGUMENT,
                     "%s: expected a weight and a packed buffer aligned to %d bytes, got %p, %p",
                     op, TT_INT8_PACK_ALIGNMENT, w, packed);
  }
  return TT_OK;
}

// Calls copy(place in the merged group's [outputs][kh][kw][channels], place in its part of the plain
// weight) for each element that is not a zero off the diagonal.
template <class F>
void each_element(const Conv& conv, F&& copy) {
  const int64_t taps = conv.shape.kernel_h * conv.shape.kernel_w;
  const int64_t own_channels = conv.channels / conv.merged,
                own_outputs = conv.outputs / conv.merged;
  for (int64_t o = 0; o < conv.outputs; ++o) {
    const int64_t first = o / own_outputs * own_channels;
    for (int64_t c = 0; c < own_channels; ++c)
      for (int64_t t = 0; t < taps; ++t)
        copy(o * conv.K + t * conv.channels + first + c, (o * own_channels + c) * taps + t);
  }
}

int64_t group_bytes(const Conv& conv) {
  return tt_int8_packed_size(conv.outputs, conv.K) - TT_INT8_PACK_TAIL;
}

int64_t plain_bytes(const Conv& conv) { return conv.outputs * conv.K / conv.merged; }

}  // namespace
}  // namespace trimtab

using namespace trimtab;

int64_t tt_conv2d_out_height(const tt_conv2d* s) {
  return out_size(s->height, s->pad_top + s->pad_bottom, s->dilation_h, s->kernel_h, s->stride_h);
}

int64_t tt_conv2d_out_width(const tt_conv2d* s) {
  return out_size(s->width, s->pad_left + s->pad_right, s->dilation_w, s->kernel_w, s->stride_w);
}

int64_t tt_int8_conv2d_packed_size(const tt_conv2d* shape) {
  const Conv conv(*shape);
  if (conv.depthwise) return conv.K * shape->out_channels;
  return conv.groups * group_bytes(conv) + TT_INT8_PACK_TAIL;
}

tt_status tt_int8_conv2d_pack(const tt_conv2d* shape, const int8_t* w, int8_t* packed,
                              const tt_parallel* parallel) {
  tt_status status = check_weight("int8_conv2d_pack", shape, w, packed);
  if (status != TT_OK) return status;
  const Conv conv(*shape);
  if (conv.depthwise) {
    for (int64_t o = 0; o < shape->out_channels; ++o)
      for (int64_t t = 0; t < conv.K; ++t) packed[t * shape->out_channels + o] = w[o * conv.K + t];
    return TT_OK;
  }
  const int64_t ordered_bytes = conv.outputs * conv.K, plain = plain_bytes(conv);
  int8_t* ordered = static_cast<int8_t*>(thread_scratch(ordered_bytes, Scratch::kPatches));
  if (ordered == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "int8_conv2d_pack: no memory for %lld bytes",
                     (long long)ordered_bytes);
  }
  for (int64_t g = 0; g < conv.groups && status == TT_OK; ++g) {
    const int8_t* from = w + g * plain;
    std::memset(ordered, 0, size_t(ordered_bytes));
    each_element(conv, [&](int64_t to, int64_t at) { ordered[to] = from[at]; });
    status = tt_int8_pack(ordered, conv.K, conv.outputs, conv.K, packed + g * group_bytes(conv),
                          parallel);
  }
  return status;
}

tt_status tt_int8_conv2d_unpack(const tt_conv2d* shape, const int8_t* packed, int8_t* w,
                                const tt_parallel* parallel) {
  tt_status status = check_weight("int8_conv2d_unpack", shape, w, packed);
  if (status != TT_OK) return status;
  const Conv conv(*shape);
  if (conv.depthwise) {
    for (int64_t o = 0; o < shape->out_channels; ++o)
      for (int64_t t = 0; t < conv.K; ++t) w[o * conv.K + t] = packed[t * shape->out_channels + o];
    return TT_OK;
  }
  const int64_t ordered_bytes = conv.outputs * conv.K, plain = plain_bytes(conv);
  int8_t* ordered = static_cast<int8_t*>(thread_scratch(ordered_bytes, Scratch::kPatches));
  if (ordered == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "int8_conv2d_unpack: no memory for %lld bytes",
                     (long long)ordered_bytes);
  }
  for (int64_t g = 0; g < conv.groups && status == TT_OK; ++g) {
    status = tt_int8_unpack(packed + g * group_bytes(conv), conv.outputs, conv.K, ordered, conv.K,
                            parallel);
    each_element(conv, [&](int64_t from, int64_t to) { w[g * plain + to] = ordered[from]; });
  }
  return status;
}
