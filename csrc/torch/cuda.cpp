#include "cuda.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>

namespace trimtab {
namespace {

enum class Backend { kAny, kCpu, kCuda, kTriton, kReference };

// TRIMTAB_BACKEND; Python refuses unknown names (ops/backend.py).
Backend forced_backend() {
  static const Backend forced = [] {
    const char* name = std::getenv("TRIMTAB_BACKEND");
    const std::string wish = name == nullptr ? "" : name;
    if (wish == "cpu") return Backend::kCpu;
    if (wish == "cuda") return Backend::kCuda;
    if (wish == "triton") return Backend::kTriton;
    if (wish == "reference") return Backend::kReference;
    return Backend::kAny;
  }();
  return forced;
}

struct Loaded {
  CudaLibrary library = {};
  std::string problem;  // empty if all of it is there
};

// The folder of this adapter, where libtrimtab_cuda.so lies too.
std::string own_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&own_folder), &info) == 0) return ".";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/'));
}

template <class Function>
void find(void* handle, const char* name, Function* function, std::string* problem) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr) *problem += std::string(problem->empty() ? "no " : ", no ") + name;
}

Loaded load() {
  Loaded found;
  const std::string path = own_folder() + "/libtrimtab_cuda.so";
  if (access(path.c_str(), R_OK) != 0) {
    found.problem = "this build has no CUDA part (no " + path + "): it was made without nvcc";
    return found;
  }
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    found.problem = dlerror();
    return found;
  }
  CudaLibrary& library = found.library;
  find(handle, "tt_supported_cuda", &library.supported, &found.problem);
  find(handle, "tt_quantize_int8_cuda", &library.quantize_int8, &found.problem);
  find(handle, "tt_int8_mm_cuda", &library.int8_mm, &found.problem);
  find(handle, "tt_int8_mm_cuda_workspace", &library.int8_mm_workspace, &found.problem);
  find(handle, "tt_int8_linear_cuda", &library.int8_linear, &found.problem);
  find(handle, "tt_int8_linear_cuda_workspace", &library.int8_linear_workspace, &found.problem);
  find(handle, "tt_int8_weight_mm_cuda", &library.int8_weight_mm, &found.problem);
  find(handle, "tt_silu_mul_quantize_int8_cuda", &library.silu_mul_quantize_int8, &found.problem);
  find(handle, "tt_rms_norm_quantize_int8_cuda", &library.rms_norm_quantize_int8, &found.problem);
  find(handle, "tt_sparse24_compress_cuda", &library.sparse24_compress, &found.problem);
  find(handle, "tt_bitmap_linear_cuda", &library.bitmap_linear, &found.problem);
  find(handle, "tt_bitmap_linear_cuda_workspace", &library.bitmap_linear_workspace, &found.problem);
  find(handle, "tt_block_linear_cuda", &library.block_linear, &found.problem);
  find(handle, "tt_block_linear_cuda_workspace", &library.block_linear_workspace, &found.problem);
  find(handle, "tt_block_grad_values_cuda", &library.block_grad_values, &found.problem);
  find(handle, "tt_block_grad_values_cuda_workspace", &library.block_grad_values_workspace,
       &found.problem);
  find(handle, "tt_sparse24_linear_cuda", &library.sparse24_linear, &found.problem);
  find(handle, "tt_sparse24_linear_cuda_workspace", &library.sparse24_linear_workspace,
       &found.problem);
  // libtorch_cuda.so comes with libtorch.so, which this adapter links.
  find(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream", &library.current_stream, &found.problem);
  return found;
}

const Loaded& loaded() {
  static const Loaded once = load();
  return once;
}

// Whether the kernels run on this device; asked once a device.
bool device_is_supported(int32_t index) {
  constexpr int32_t kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet, 1: yes, 2: no
  if (index < 0 || index >= kMaxDevices) return false;
  int answer = known[index].load(std::memory_order_relaxed);
  if (answer == 0) {
    const torch::stable::accelerator::DeviceGuard guard(index);
    answer = loaded().library.supported() == TT_OK ? 1 : 2;
    known[index].store(answer, std::memory_order_relaxed);
  }
  return answer == 1;
}

const CudaLibrary& library_or_throw(const char* op) {
  TT_CHECK(loaded().problem.empty(), op, ": ", loaded().problem);
  return loaded().library;
}

}  // namespace

bool python_answers() { return forced_backend() == Backend::kReference; }

bool cuda_serves(const char* op, const Place& place) {
  switch (forced_backend()) {
    case Backend::kCpu:
      TT_CHECK(false, op, ": expected tensors on the CPU, as TRIMTAB_BACKEND=cpu says, got ",
               describe(place));
      return false;
    case Backend::kCuda: return true;
    case Backend::kTriton: return false;
    case Backend::kReference:
    case Backend::kAny: break;
  }
  return loaded().problem.empty() && device_is_supported(place.index);
}

CudaCall::CudaCall(const char* op, const Place& where)
    : library(library_or_throw(op)), place(where), guard(where.index) {
  STABLE_TORCH_ERROR_CODE_CHECK(library.current_stream(place.index, &stream));
}

Workspace::Workspace(const CudaCall& call, int64_t bytes) {
  if (bytes == 0) return;
  tensor = empty(call.place, &bytes, 1, ScalarType::Char);
  data = tensor->mutable_data_ptr();
}

Rows cuda_rows(const Tensor& x, bool apart) {
  Rows rows(x);
  if (apart && rows.M > 1 && rows.row_stride < rows.K) {
    rows.tensor = torch::stable::clone(torch::stable::contiguous(x));
    rows.data = rows.tensor.const_data_ptr();
    rows.row_stride = rows.K;
  }
  if (rows.M <= 1) rows.row_stride = (rows.K + 15) / 16 * 16;
  return rows;
}

Rows aligned_cuda_rows(const Tensor& x) {
  Rows rows = cuda_rows(x);
  const int64_t size = int64_t(x.element_size()), each = 16 / size;
  if (rows.M == 0 || rows.K == 0 ||
      (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.row_stride % each == 0))
    return rows;
  rows.row_stride = (rows.K + each - 1) / each * each;
  rows.tensor = empty_rows(x, rows.row_stride, x.scalar_type());
  Tensor inside = torch::stable::narrow(rows.tensor, x.dim() - 1, 0, rows.K);
  torch::stable::copy_(inside, x);
  rows.data = rows.tensor.const_data_ptr();
  return rows;
}

Rows cuda_weight(const char* op, const Tensor& weight, int64_t N, int64_t K) {
  TT_CHECK(weight.dim() != 1, op, ": expected weight [N=", N, ", K=", K,
           "] int8 on a GPU, got its packed form ", describe(weight),
           ", which only the CPU reads; int8_unpack undoes it");
  TT_CHECK(weight.dim() == 2 && weight.sizes()[0] == N && weight.sizes()[1] == K, op,
           ": expected weight [N=", N, ", K=", K, "] int8, got ", describe(weight));
  return cuda_rows(weight, /*apart=*/true);
}

}  // namespace trimtab
