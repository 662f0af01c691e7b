// The host side of launch.cuh.
#include "cuda/launch.cuh"

#include <mutex>

namespace trimtab {
namespace {

constexpr int kMaxDevices = 64;

tt_status failed(const char* op, const char* what, cudaError_t error) {
  return set_error(TT_CUDA_ERROR, "%s: %s failed: %s", op, what, cudaGetErrorString(error));
}

cudaError_t read_facts(int device, DeviceFacts* facts) {
  const auto get = [&](int* into, cudaDeviceAttr what) {
    return cudaDeviceGetAttribute(into, what, device);
  };
  int major = 0, minor = 0;
  cudaError_t error = get(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = get(&minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = get(&facts->sm_count, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess)
    error = get(&facts->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  facts->arch = 10 * major + minor;
  return error;
}

// cuTensorMapEncodeTiled, found through the runtime: libcuda is not linked, so that the library loads on a
// machine without a driver.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(function)
               : nullptr;
  }();
  return found;
}

}  // namespace

tt_status device_facts(const char* op, DeviceFacts* facts) {
  static DeviceFacts known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  static cudaError_t outcome[kMaxDevices];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    return set_error(TT_UNSUPPORTED, "%s: expected a CUDA device, got none (%s)", op,
                     cudaGetErrorString(error));
  if (device >= kMaxDevices)
    return set_error(TT_UNSUPPORTED, "%s: expected a device number below %d, got %d", op,
                     kMaxDevices, device);
  std::call_once(once[device], [&] { outcome[device] = read_facts(device, &known[device]); });
  if (outcome[device] != cudaSuccess) return failed(op, "reading the device", outcome[device]);
  *facts = known[device];
  if (facts->arch < 80)
    return set_error(TT_UNSUPPORTED,
                     "%s: expected a GPU of compute capability 8.0 or later, got %d.%d", op,
                     facts->arch / 10, facts->arch % 10);
  return TT_OK;
}

tt_status launch_raw(const char* op, const void* kernel, const LaunchShape& shape, void* params,
                     tt_stream stream) {
  // More than 48 KiB has to be asked for, once a kernel and device; asking again costs about 1 us.
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return failed(op, "asking for shared memory", error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  if (shape.cluster > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  void* arguments[] = {params};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  return error == cudaSuccess ? TT_OK : failed(op, "launching its kernel", error);
}

tt_status make_tensor_map(const char* op, CUtensorMap* map, const void* data, int64_t rows,
                          int64_t columns, int64_t stride, int box_rows, int box_bytes) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr)
    return set_error(TT_UNSUPPORTED, "%s: expected a driver of CUDA 12.0 or later", op);
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(stride)};
  const cuuint32_t box[] = {cuuint32_t(box_bytes), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return TT_OK;
  return set_error(TT_CUDA_ERROR, "%s: the driver refused a tensor map of %lld x %lld (code %d)",
                   op, (long long)rows, (long long)columns, int(result));
}

}  // namespace trimtab

tt_status tt_supported_cuda(void) {
  trimtab::DeviceFacts facts;
  return trimtab::device_facts("tt_supported_cuda", &facts);
}
