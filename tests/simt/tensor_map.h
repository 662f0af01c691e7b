// What this machine packs into a CUtensorMap, where cuTensorMapEncodeTiled packs the hardware's own words.
#pragma once
#include <cuda.h>

#include "simt/core.h"

namespace simt {

// A row-major [rows, columns] tensor of bytes in boxes of box_rows x box_bytes (128 or 64), in the swizzle of
// that width, zeros outside.
struct TensorMap {
  uint64_t mark;
  char* data;
  int64_t rows, columns, stride, box_rows, box_bytes;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "it lies in the opaque words");

constexpr uint64_t kTensorMapMark = 0x7e4502a9c3f1d86bull;
constexpr int kBoxBytes = 128;  // of a row, at most

// Refuses what the driver refuses: alignment, sizes of 0, boxes and strides beyond their fields.
inline tt_status make_tensor_map(const char* op, CUtensorMap* map, const void* data, int64_t rows,
                                 int64_t columns, int64_t stride, int box_rows, int box_bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const int64_t most = int64_t{1} << 32;
  const bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && data != nullptr && at % 16 == 0 &&
                    rows > 0 && rows <= most && columns > 0 && columns <= most &&
                    stride >= columns && stride % 16 == 0 && stride < (int64_t{1} << 40) &&
                    box_rows > 0 && box_rows <= 256 && (box_bytes == 128 || box_bytes == 64);
  if (!good)
    return trimtab::set_error(TT_CUDA_ERROR,
                              "%s: the driver refused a tensor map of %lld x %lld (stride %lld, "
                              "boxes of %d rows, data %d "
                              "bytes off its alignment of 16)",
                              op, (long long)rows, (long long)columns, (long long)stride, box_rows,
                              int(at % 16));
  char* const bytes = static_cast<char*>(const_cast<void*>(data));
  const TensorMap made = {kTensorMapMark, bytes, rows, columns, stride, box_rows, box_bytes};
  *map = {};
  std::memcpy(map, &made, sizeof made);
  return TT_OK;
}

inline TensorMap tensor_map(const CUtensorMap* map, Where where) {
  TensorMap m;
  check_aligned(map, 64, "tensor map", where);
  std::memcpy(&m, map, sizeof m);
  if (m.mark != kTensorMapMark) fault(where, "not a tensor map");
  return m;
}

}  // namespace simt
