// The packed weight of int8_conv2d: K runs over (kh, kw, c), so that a patch of an [H][W][C] image is
// gathered in long copies; groups follow each other and share the tail.
#include <trimtab/int8_pack.h>

#include <cstring>

#include "cpu/int8_conv2d.h"
#include "cpu/scratch.h"
#include "cpu/status.h"

namespace trimtab {

Conv::Conv(const tt_conv2d& s) : shape(s) {
  out_h = tt_conv2d_out_height(&s);
  out_w = tt_conv2d_out_width(&s);
  line_bytes = (s.width + s.pad_left + s.pad_right) * s.channels;
  image_bytes = round_up((s.height + s.pad_top + s.pad_bottom) * line_bytes, 64);
  K = s.channels / s.groups * s.kernel_h * s.kernel_w;
  depthwise = s.channels == s.groups && s.out_channels == s.groups;
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
                     "%s: expected a weight and a packed buffer aligned to %d bytes, got %p, %p", op,
                     TT_INT8_PACK_ALIGNMENT, w, packed);
  }
  return TT_OK;
}

// Calls copy(place in [O][kh][kw][c], place in [O][c][kh][kw]) for one group's elements.
template <class F>
void each_element(const Conv& conv, F&& copy) {
  const int64_t taps = conv.shape.kernel_h * conv.shape.kernel_w;
  const int64_t channels = conv.K / taps, outputs = conv.shape.out_channels / conv.shape.groups;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t)
        copy(o * conv.K + t * channels + c, o * conv.K + c * taps + t);
}

int64_t group_bytes(const Conv& conv) {
  return tt_int8_packed_size(conv.shape.out_channels / conv.shape.groups, conv.K) -
         TT_INT8_PACK_TAIL;
}

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
  return shape->groups * group_bytes(conv) + TT_INT8_PACK_TAIL;
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
  const int64_t outputs = shape->out_channels / shape->groups, plain = outputs * conv.K;
  int8_t* ordered = static_cast<int8_t*>(thread_scratch(plain, Scratch::kPatches));
  if (ordered == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "int8_conv2d_pack: no memory for %lld bytes", (long long)plain);
  }
  for (int64_t g = 0; g < shape->groups && status == TT_OK; ++g) {
    const int8_t* from = w + g * plain;
    each_element(conv, [&](int64_t to, int64_t at) { ordered[to] = from[at]; });
    status = tt_int8_pack(ordered, conv.K, outputs, conv.K, packed + g * group_bytes(conv), parallel);
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
  const int64_t outputs = shape->out_channels / shape->groups, plain = outputs * conv.K;
  int8_t* ordered = static_cast<int8_t*>(thread_scratch(plain, Scratch::kPatches));
  if (ordered == nullptr) {
    return set_error(TT_OUT_OF_MEMORY, "int8_conv2d_unpack: no memory for %lld bytes",
                     (long long)plain);
  }
  for (int64_t g = 0; g < shape->groups && status == TT_OK; ++g) {
    status = tt_int8_unpack(packed + g * group_bytes(conv), outputs, conv.K, ordered, conv.K, parallel);
    each_element(conv, [&](int64_t from, int64_t to) { w[g * plain + to] = ordered[from]; });
  }
  return status;
}
