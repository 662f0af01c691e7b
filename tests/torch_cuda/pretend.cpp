// A GPU that is not there, for tests/test_torch_cuda.py: built as libtrimtab_cuda.so beside a copy of the
// torch adapter and preloaded, so that the adapter's CUDA path runs on CPU memory.
//
// It answers torch's C interface for what concerns devices (every tensor lies on cuda:0, or on cuda:1 if its
// memory was named to pretend_other_device), and the C interface of libtrimtab_cuda.so by the CPU kernels,
// which get the plain weight packed for the call. A wrong stream, workspace or device is an error.
#include <dlfcn.h>
#include <trimtab/bitmap_linear.h>
#include <trimtab/block_linear.h>
#include <trimtab/int8_linear.h>
#include <trimtab/int8_pack.h>
#include <trimtab/int8_weight_mm.h>
#include <trimtab/quantize_int8.h>
#include <trimtab/rms_norm_quantize_int8.h>
#include <trimtab/silu_mul_quantize_int8.h>
#include <trimtab/sparse24_compress.h>
#include <trimtab/sparse24_linear.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using Handle = void*;

namespace {

void* const kStream = reinterpret_cast<void*>(0x57ea);
constexpr int64_t kWorkspace = 1000;

int64_t guards = 0, guarded = -1, allocations = 0, last_b_stride = -1;
const void* other_device = nullptr;

template <class Function>
Function real(const char* name) {
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  void* found = torch == nullptr ? nullptr : dlsym(torch, name);
  if (found == nullptr) std::fprintf(stderr, "pretend: no %s\n", name), std::abort();
  return reinterpret_cast<Function>(found);
}

tt_status wrong(const char* what) {
  tt_set_last_error(what);
  return TT_INVALID_ARGUMENT;
}

tt_status check_call(tt_stream stream) {
  if (guards != 1 || guarded != 0) return wrong("pretend: no device guard for cuda:0");
  return stream == kStream ? TT_OK : wrong("pretend: not the current stream");
}

// The plain weight as the CPU kernels read it.
struct Packed {
  void* data = nullptr;
  Packed(const int8_t* b, int64_t stride, int64_t N, int64_t K) {
    last_b_stride = stride;
    const int64_t bytes = (tt_int8_packed_size(N, K) + 63) / 64 * 64;
    data = std::aligned_alloc(64, size_t(bytes));
    tt_int8_pack(b, stride, N, K, static_cast<int8_t*>(data), nullptr);
  }
  ~Packed() { std::free(data); }
  const int8_t* get() const { return static_cast<const int8_t*>(data); }
};

tt_status check_workspace(void* workspace) {
  if (workspace == nullptr) return wrong("pretend: no workspace");
  std::memset(workspace, 0x5a, kWorkspace);
  return TT_OK;
}

}  // namespace

// --- what the test asks

EXPORT int64_t pretend_guards() { return guards; }
EXPORT int64_t pretend_allocations() { return allocations; }
EXPORT int64_t pretend_b_stride() { return last_b_stride; }
EXPORT void pretend_other_device(const void* data) { other_device = data; }

// --- torch

EXPORT int32_t aoti_torch_get_device_type(Handle, int32_t* type) { return *type = 1, 0; }

EXPORT int32_t aoti_torch_get_device_index(Handle tensor, int32_t* index) {
  void* data = nullptr;
  real<int32_t (*)(Handle, void**)>("aoti_torch_get_data_ptr")(tensor, &data);
  return *index = other_device != nullptr && data == other_device, 0;
}

EXPORT int32_t aoti_torch_create_device_guard(int32_t index, Handle* guard) {
  ++guards, guarded = index;
  return *guard = &guards, 0;
}

EXPORT int32_t aoti_torch_delete_device_guard(Handle) { return --guards, 0; }

EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = kStream, 0;
}

EXPORT int32_t aoti_torch_empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t type, int32_t index, Handle* out) {
  if (type != 1 || index != 0) return 1;
  ++allocations;
  return real<decltype(&aoti_torch_empty_strided)>("aoti_torch_empty_strided")(rank, sizes, strides,
                                                                               dtype, 0, 0, out);
}

// --- libtrimtab_cuda.so

tt_status tt_supported_cuda(void) { return TT_OK; }
int64_t tt_int8_mm_cuda_workspace(int64_t, int64_t, int64_t) { return kWorkspace; }
int64_t tt_int8_linear_cuda_workspace(int64_t, int64_t, int64_t) { return kWorkspace; }

tt_status tt_quantize_int8_cuda(const void* x, tt_dtype dtype, int64_t stride, int64_t M, int64_t K,
                                int8_t* q, int64_t q_stride, float* scale, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  return tt_quantize_int8(x, dtype, stride, M, K, q, q_stride, scale, nullptr);
}

tt_status tt_silu_mul_quantize_int8_cuda(const void* gate, int64_t gate_stride, const void* up,
                                         int64_t up_stride, tt_dtype dtype, int64_t M, int64_t K,
                                         int8_t* q, int64_t q_stride, float* scale,
                                         tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  return tt_silu_mul_quantize_int8(gate, gate_stride, up, up_stride, dtype, M, K, q, q_stride,
                                   scale, nullptr);
}

tt_status tt_rms_norm_quantize_int8_cuda(const void* x, tt_dtype dtype, int64_t stride,
                                         const void* weight, tt_dtype weight_dtype, float eps,
                                         int64_t M, int64_t K, int8_t* q, int64_t q_stride,
                                         float* scale, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  return tt_rms_norm_quantize_int8(x, dtype, stride, weight, weight_dtype, eps, M, K, q, q_stride,
                                   scale, nullptr);
}

tt_status tt_int8_mm_cuda(const int8_t* a, int64_t a_stride, const float* a_scale, const int8_t* b,
                          int64_t b_stride, int64_t M, int64_t N, int64_t K,
                          const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (const tt_status status = check_workspace(workspace)) return status;
  const Packed packed(b, b_stride, N, K);
  return tt_int8_mm(a, a_stride, a_scale, packed.get(), M, N, K, epilogue, nullptr);
}

tt_status tt_int8_linear_cuda(const void* x, tt_dtype dtype, int64_t x_stride, const int8_t* b,
                              int64_t b_stride, int64_t M, int64_t N, int64_t K,
                              const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (const tt_status status = check_workspace(workspace)) return status;
  const Packed packed(b, b_stride, N, K);
  return tt_int8_linear(x, dtype, x_stride, packed.get(), M, N, K, epilogue, nullptr);
}

tt_status tt_int8_weight_mm_cuda(const void* x, tt_dtype dtype, int64_t x_stride, const int8_t* b,
                                 int64_t b_stride, int64_t group, const int8_t* zero_point,
                                 int64_t M, int64_t N, int64_t K, const tt_epilogue* epilogue,
                                 tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (M > TT_INT8_WEIGHT_MM_CUDA_MAX_M) return wrong("pretend: too many rows");
  const Packed packed(b, b_stride, N, K);
  return tt_int8_weight_mm(x, dtype, x_stride, packed.get(), group, zero_point, M, N, K, epilogue,
                           nullptr);
}

// One way, in rows whose padding is left alone.
tt_status tt_sparse24_compress_cuda(const void* weight, tt_dtype dtype, int64_t stride, int64_t N,
                                    int64_t K, const tt_sparse24_compressed* out,
                                    const tt_sparse24_compressed* transposed, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (dtype != TT_F32 || out->row_bytes % 16 != 0 || transposed != nullptr || !out->indices)
    return wrong("pretend: not one way of float32");
  const int64_t row = (K + 3) / 4 * 2 * 4;
  std::vector<char> values(size_t(N * row));
  const tt_status status =
      tt_sparse24_compress(weight, dtype, stride, N, K, values.data(), out->indices, nullptr);
  for (int64_t n = 0; n < N; ++n)
    std::memcpy(static_cast<char*>(out->values) + n * out->row_bytes, &values[size_t(n * row)],
                size_t(row));
  return status;
}

int64_t tt_bitmap_linear_cuda_workspace(int64_t, int64_t, tt_dtype) { return kWorkspace; }

tt_status tt_bitmap_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                                const tt_bitmap* weight, int64_t M, int64_t N, int64_t K,
                                const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (const tt_status status = check_workspace(workspace)) return status;
  if (M > TT_BITMAP_LINEAR_CUDA_MAX_M) return wrong("pretend: too many rows");
  return tt_bitmap_linear(x, x_dtype, x_stride, weight, M, N, K, epilogue, nullptr);
}

int64_t tt_block_linear_cuda_workspace(const tt_block_weight*, int64_t) { return kWorkspace; }

tt_status tt_block_linear_cuda(const void* x, tt_dtype x_dtype, int64_t x_stride,
                               const tt_block_weight* weight, int64_t M,
                               const tt_epilogue* epilogue, void* workspace, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (const tt_status status = check_workspace(workspace)) return status;
  const int64_t each = x_dtype == TT_F32 ? 4 : 8;  // of 16 bytes
  if (weight->dtype != TT_I8 &&
      ((M > 1 && x_stride % each != 0) || reinterpret_cast<uintptr_t>(x) % 16 != 0))
    return wrong("pretend: x is not aligned");
  if (reinterpret_cast<uintptr_t>(weight->values) % 16 != 0)
    return wrong("pretend: values are not aligned");
  return tt_block_linear(x, x_dtype, x_stride, weight, M, epilogue, nullptr);
}

int64_t tt_block_grad_values_cuda_workspace(const tt_block_weight*, int64_t) { return kWorkspace; }

tt_status tt_block_grad_values_cuda(const void* grad, int64_t grad_stride, const void* x,
                                    int64_t x_stride, const tt_block_weight* weight, int64_t M,
                                    void* grad_values, void* workspace, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (const tt_status status = check_workspace(workspace)) return status;
  const int64_t each = weight->dtype == TT_F32 ? 4 : 8;
  if (M > 1 && (grad_stride % each != 0 || x_stride % each != 0))
    return wrong("pretend: rows are not aligned");
  return tt_block_grad_values(grad, grad_stride, x, x_stride, weight, M, grad_values, nullptr);
}

int64_t tt_sparse24_linear_cuda_workspace(int64_t, int64_t, tt_dtype) { return kWorkspace; }

// int8 values alone, whose positions are 0 and 1 in every group.
tt_status tt_sparse24_linear_cuda(const void* x, tt_dtype dtype, int64_t x_stride, int64_t M,
                                  const tt_sparse24_weight* w, const tt_epilogue* epilogue,
                                  void* workspace, tt_stream stream) {
  if (const tt_status status = check_call(stream)) return status;
  if (const tt_status status = check_workspace(workspace)) return status;
  if (w->dtype != TT_I8 || w->row_bytes % 16 != 0) return wrong("pretend: not int8 in whole rows");
  const int64_t words = (w->N + 15) / 16 * ((w->K + 63) / 64) * 32;
  for (int64_t i = 0; i < words; ++i)
    if (w->metadata[i] != 0x44444444) return wrong("pretend: other positions than 0 and 1");
  std::vector<int8_t> dense(size_t(w->N * w->K));
  for (int64_t n = 0; n < w->N; ++n)
    for (int64_t k = 0; k < w->K; ++k)
      if (k % 4 < 2)
        dense[size_t(n * w->K + k)] =
            static_cast<const int8_t*>(w->values)[n * w->row_bytes + k / 4 * 2 + k % 4];
  const Packed packed(dense.data(), w->K, w->N, w->K);
  return tt_int8_linear(x, dtype, x_stride, packed.get(), M, w->N, w->K, epilogue, nullptr);
}
