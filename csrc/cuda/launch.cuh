// From a launcher to the device: errors as tt_status, kernels with one params struct, device facts,
// tensor maps.
#pragma once
#include <cuda.h>
#include <trimtab/trimtab.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace trimtab {

// Formats the message for tt_last_error and returns the status. (csrc/cpu/status.cpp, linked in here too)
tt_status set_error(tt_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3), cold));

// What launchers ask of the current device; read once a device.
struct DeviceFacts {
  int arch;  // 80 for 8.0, 90 for 9.0
  int sm_count;
  int shared_bytes;  // the most dynamic shared memory of a block
};

struct LaunchShape {
  dim3 grid, block;
  int shared_bytes;
  int cluster = 1;  // blocks of a cluster, along x
};

// Facts of the current device, or TT_UNSUPPORTED with a message that names the op where there is none or it
// is older than sm_80.
tt_status device_facts(const char* op, DeviceFacts* facts);

tt_status launch_raw(const char* op, const void* kernel, const LaunchShape& shape, void* params,
                     tt_stream stream);

// Launches kernel(params) and turns a refusal into a status. Params must be trivially copyable.
template <class Params>
tt_status launch(const char* op, void (*kernel)(const Params), const LaunchShape& shape,
                 const Params& params, tt_stream stream) {
#if defined(TT_SIMT)
  return simt::launch(op, shape, stream, [&] { kernel(params); });
#else
  Params copy = params;
  return launch_raw(op, reinterpret_cast<const void*>(kernel), shape, &copy, stream);
#endif
}

// A row-major [rows, columns] int8 tensor, rows `stride` bytes apart, as boxes of box_rows x box_bytes (128 or
// 64) in the swizzle of that width. data aligned to 16, stride a multiple of 16, box_rows at most 256.
tt_status make_tensor_map(const char* op, CUtensorMap* map, const void* data, int64_t rows,
                          int64_t columns, int64_t stride, int box_rows, int box_bytes = 128);

}  // namespace trimtab
