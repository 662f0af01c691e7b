// The DLPack exchange format (dmlc.github.io/dlpack), as far as a consumer on the CPU reads it. Field
// order and widths are the format's; a producer hands over a capsule that points to one of the two
// Managed structs.
#pragma once
#include <cstdint>

namespace trimtab::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCudaHost = 3, kRocmHost = 11 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; NULL: row-major
  uint64_t byte_offset;
};

// Capsule "dltensor".
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed* self);
};

// Capsule "dltensor_versioned", from DLPack 1.0 on.
constexpr uint32_t kMajor = 1;
constexpr uint64_t kReadOnly = 1;
struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned* self);
  uint64_t flags;
  Tensor tensor;
};

}  // namespace trimtab::dlpack
