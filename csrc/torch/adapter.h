// From torch tensors to the C interface: views as 2-D rows, checks that name the op, outputs, threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <trimtab/trimtab.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// STD_TORCH_CHECK without its prefix of function and build path: the message alone, which names the op.
#define TT_CHECK(condition, ...)                                                    \
  do {                                                                              \
    if (!(condition)) throw std::runtime_error(trimtab::join_message(__VA_ARGS__)); \
  } while (0)

namespace trimtab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string join_message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// torch's own thread pool as a tt_parallel.
tt_parallel torch_pool();

// Throws with tt_last_error() if status is not TT_OK.
void check_status(tt_status status);

// "[2, 3] bfloat16", for messages.
std::string describe(const Tensor& tensor);

// "int8", for messages.
const char* dtype_name(ScalarType dtype);

// float32, bfloat16 or float16
bool is_float(ScalarType dtype);

// The dtype as ours; throws "<op>: expected <name> of float32, bfloat16 or float16, got ...".
tt_dtype float_dtype(const char* op, const char* name, const Tensor& tensor);

// Where a tensor lies, in the numbers of torch's C interface.
struct Place {
  int32_t type, index;
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  static Place cpu() { return {aoti_torch_device_type_cpu(), 0}; }
};
Place place_of(const Tensor& tensor);
// "the CPU", "cuda:1"
std::string describe(const Place& place);

// Throws unless the tensor lies there.
void check_place(const char* op, const char* name, const Tensor& tensor, const Place& place);

// Throws unless the tensor is int8 / fp32, has `rank` dimensions (-1: any) and lies on that device.
void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  int rank, const Place& place = Place::cpu());

// Throws unless `out` is a contiguous tensor of that dtype and those sizes on that device.
void check_out(const char* op, const char* name, const Tensor& out, ScalarType dtype,
               const int64_t* sizes, int64_t rank, const Place& place = Place::cpu());

// A tensor [..., K] as M rows of K adjacent elements, row_stride elements apart. Expanded and sliced
// tensors are read in place; others are copied once, and the copy is kept alive here.
struct Rows {
  Tensor tensor;  // what data points into
  const void* data = nullptr;
  int64_t M = 1, K = 0, row_stride = 0;
  explicit Rows(const Tensor& x);
};

// A new CPU tensor; the first dimension has the largest stride.
Tensor empty_strided_cpu(const int64_t* sizes, const int64_t* strides, int64_t rank,
                         ScalarType dtype);
// A new contiguous tensor.
Tensor empty(const Place& place, const int64_t* sizes, int64_t rank, ScalarType dtype);
Tensor empty_cpu(const int64_t* sizes, int64_t rank, ScalarType dtype);
// On x's device; the sizes of x with the last one replaced.
Tensor empty_rows(const Tensor& x, int64_t last, ScalarType dtype);

// A weight ready for the kernels: the packed tensor itself, or a plain [N, K] one packed for this call.
struct PackedWeight {
  Tensor tensor;
  const int8_t* data = nullptr;
  int64_t N = 0;
  PackedWeight(const char* op, const Tensor& weight, int64_t N, int64_t K);
};

}  // namespace trimtab

// STABLE_TORCH_LIBRARY_FRAGMENT and _IMPL, once a file, but never unregistered: torch 2.13 aborts at
// exit when an op with a named overload is (jit::deregisterOperator meets a schema that is gone).
#define TT_OPS(m) TT_REGISTER(tt_define_ops, FRAGMENT, nullptr, m)
#define TT_CPU_OPS(m) TT_REGISTER(tt_implement_cpu, IMPL, "CPU", m)
#define TT_CUDA_OPS(m) TT_REGISTER(tt_implement_cuda, IMPL, "CUDA", m)
#define TT_REGISTER(function, kind, key, m)                                                      \
  static void function(torch::stable::detail::StableLibrary&);                                   \
  [[maybe_unused]] static const auto& function##_kept =                                          \
      *new torch::stable::detail::StableTorchLibraryInit(                                        \
          torch::stable::detail::StableLibrary::Kind::kind, &function, "trimtab", key, __FILE__, \
          __LINE__);                                                                             \
  static void function(torch::stable::detail::StableLibrary& m)
