// A weight of kept values and a bit mask, as torch hands it over.
#pragma once
#include <trimtab/bitmap_linear.h>

#include "adapter.h"

namespace trimtab {

// The weight as the C interface takes it.
inline tt_bitmap bitmap_of(const char* op, const Tensor& values, const Tensor& bitmap,
                           const Tensor& row_start, tt_dtype dtype, int64_t K, const Place& place) {
  const int64_t N = bitmap.sizes()[0];
  TT_CHECK(bitmap.sizes()[1] == tt_bitmap_row_bytes(K) && bitmap.is_contiguous(), op,
           ": expected a contiguous bitmap [N, ", tt_bitmap_row_bytes(K), "] for K=", K, ", got ",
           describe(bitmap));
  check_tensor(op, "row_start", row_start, ScalarType::Long, 1, place);
  TT_CHECK(row_start.numel() == N + 1 && row_start.is_contiguous(), op,
           ": expected a contiguous row_start [N + 1=", N + 1, "], got ", describe(row_start));
  TT_CHECK(values.dim() == 1 && values.is_contiguous(), op,
           ": expected contiguous values [kept], got ", describe(values));
  return {values.const_data_ptr(), dtype, static_cast<const uint8_t*>(bitmap.const_data_ptr()),
          static_cast<const int64_t*>(row_start.const_data_ptr()), values.numel()};
}

}  // namespace trimtab
