// What the CUDA implementations ask of torch and of libtrimtab_cuda.so. Neither is linked: one adapter
// serves a torch with CUDA and one without, so both are looked up at the first call.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <trimtab/bitmap_linear.h>
#include <trimtab/block_linear.h>
#include <trimtab/int8_linear.h>
#include <trimtab/int8_weight_mm.h>
#include <trimtab/quantize_int8.h>
#include <trimtab/rms_norm_quantize_int8.h>
#include <trimtab/silu_mul_quantize_int8.h>
#include <trimtab/sparse24_compress.h>
#include <trimtab/sparse24_linear.h>

#include "adapter.h"

namespace trimtab {

// True under TRIMTAB_BACKEND=reference, which Python registers instead of C++ (ops/reference_backend.py).
bool python_answers();

// The functions of libtrimtab_cuda.so, and torch's current stream.
struct CudaLibrary {
  decltype(&tt_supported_cuda) supported;
  decltype(&tt_quantize_int8_cuda) quantize_int8;
  decltype(&tt_int8_mm_cuda) int8_mm;
  decltype(&tt_int8_mm_cuda_workspace) int8_mm_workspace;
  decltype(&tt_int8_linear_cuda) int8_linear;
  decltype(&tt_int8_linear_cuda_workspace) int8_linear_workspace;
  decltype(&tt_int8_weight_mm_cuda) int8_weight_mm;
  decltype(&tt_silu_mul_quantize_int8_cuda) silu_mul_quantize_int8;
  decltype(&tt_rms_norm_quantize_int8_cuda) rms_norm_quantize_int8;
  decltype(&tt_sparse24_compress_cuda) sparse24_compress;
  decltype(&tt_bitmap_linear_cuda) bitmap_linear;
  decltype(&tt_bitmap_linear_cuda_workspace) bitmap_linear_workspace;
  decltype(&tt_block_linear_cuda) block_linear;
  decltype(&tt_block_linear_cuda_workspace) block_linear_workspace;
  decltype(&tt_block_grad_values_cuda) block_grad_values;
  decltype(&tt_block_grad_values_cuda_workspace) block_grad_values_workspace;
  decltype(&tt_sparse24_linear_cuda) sparse24_linear;
  decltype(&tt_sparse24_linear_cuda_workspace) sparse24_linear_workspace;
  AOTITorchError (*current_stream)(int32_t device, void** stream);
};

// True where CUDA C++ answers for this tensor's device: TRIMTAB_BACKEND=cuda, or by default a build with the
// CUDA library and an NVIDIA GPU of compute capability 8.0 or later. Otherwise Triton answers. Throws
// where TRIMTAB_BACKEND keeps this tensor from both.
bool cuda_serves(const char* op, const Place& place);

// One call on a device: makes it the current one until destruction, and knows its current stream.
// Throws "<op>: ..." where there is no CUDA library.
struct CudaCall {
  const CudaLibrary& library;
  Place place;
  torch::stable::accelerator::DeviceGuard guard;
  tt_stream stream = nullptr;
  CudaCall(const char* op, const Place& where);
};

// Scratch memory of one call, from torch's allocator: given back when this ends, and handed out again only
// to later work of the same stream.
struct Workspace {
  std::optional<Tensor> tensor;
  void* data = nullptr;
  Workspace(const CudaCall& call, int64_t bytes);
};

// [M, K] as rows of adjacent elements. A single row gets a stride of whole 16 bytes: there is no second one
// that it could be wrong for. With `apart`, rows that overlap (expanded) are copied.
Rows cuda_rows(const Tensor& x, bool apart = false);

// The same with every row at a multiple of 16 bytes; copied where it is not.
Rows aligned_cuda_rows(const Tensor& x);

// A weight as the CUDA kernels read it: plain [N, K]; throws on the packed form, which is the CPU's.
Rows cuda_weight(const char* op, const Tensor& weight, int64_t N, int64_t K);

// Calls another overload of an op, which Python implements; as many results as the stack has room for.
template <class... Args>
std::array<StableIValue, 8> call_overload(const char* op, const char* overload,
                                          const Args&... args) {
  static_assert(sizeof...(Args) <= 8);
  std::array<StableIValue, 8> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

}  // namespace trimtab
