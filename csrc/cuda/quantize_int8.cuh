// quantize_int8 on a CUDA device, for the launchers that quantize on their way to a product.
#pragma once
#include <trimtab/trimtab.h>

#include <cstdint>

namespace trimtab {

struct QuantizeArgs {
  const void* x;  // [M, K] of x_dtype, rows x_stride elements apart
  tt_dtype x_dtype;
  int64_t x_stride, M, K;
  int8_t* q;  // [M, max(K, q_columns)], rows q_stride bytes apart
  int64_t q_stride;
  int64_t q_columns;   // zeros are written from K to here; K for none
  float* scale;        // [M]
  uint32_t* zero;      // words set to 0 in passing: the counters of a split-K product
  int64_t zero_words;  // 0 for none
};

// One launch on the stream. The caller has checked dtype, sizes and pointers; op names it in an error.
tt_status launch_quantize_int8(const char* op, const QuantizeArgs& args, tt_stream stream);

}  // namespace trimtab
