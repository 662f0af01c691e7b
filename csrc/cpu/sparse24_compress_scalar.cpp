#include "cpu/sparse24_compress.h"

namespace trimtab {
namespace {

template <class T>
bool row(const void* weight, int64_t K, void* values, uint8_t* indices) {
  return sparse24_groups(static_cast<const T*>(weight), 0, K, static_cast<T*>(values), indices);
}

}  // namespace

bool sparse24_row_scalar(const void* weight, tt_dtype dtype, int64_t K, void* values,
                         uint8_t* indices) {
  switch (dtype) {
    case TT_F32: return row<float>(weight, K, values, indices);
    case TT_BF16: return row<bf16>(weight, K, values, indices);
    case TT_F16: return row<fp16>(weight, K, values, indices);
    default: return row<int8_t>(weight, K, values, indices);
  }
}

}  // namespace trimtab
