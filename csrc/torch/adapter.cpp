#include "adapter.h"

#include <sys/mman.h>
#include <trimtab/int8_pack.h>

namespace trimtab {
namespace {

void run_on_torch(void*, int64_t n, tt_task task, void* ctx) {
  struct Call {
    tt_task task;
    void* ctx;
  } call{task, ctx};
  torch_parallel_for(
      0, n, 1,
      [](int64_t begin, int64_t end, void* opaque) {
        const Call& c = *static_cast<Call*>(opaque);
        for (int64_t i = begin; i < end; ++i) c.task(c.ctx, i);
      },
      &call);
}

// Asks for 2 MiB pages. A large tensor comes as fresh pages from the kernel at every call; first touching
// 50 MB of them takes 19 ms in pages of 4 KiB and 5 ms in pages of 2 MiB, and a packed weight in few
// pages streams without page walks. A refusal changes nothing but speed.
void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < int64_t(2 * kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Leading dimensions walk memory with one stride: [2, 3, K] with strides [3 s, s, 1].
bool rows_have_one_stride(const Tensor& x, int64_t* stride) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  int64_t inner = -1, expected = 0;
  for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (inner < 0) {
      inner = strides[d];
    } else if (strides[d] != expected) {
      return false;
    }
    expected = strides[d] * sizes[d];
  }
  *stride = inner < 0 ? 0 : inner;
  return true;
}

}  // namespace

tt_parallel torch_pool() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return {run_on_torch, nullptr, int32_t(threads)};
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

void check_status(tt_status status) { TT_CHECK(status == TT_OK, tt_last_error()); }

std::string describe(const Tensor& tensor) {
  std::string text = "[";
  const auto sizes = tensor.sizes();
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "] " + dtype_name(tensor.scalar_type());
}

tt_dtype float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return TT_F32;
    case ScalarType::BFloat16: return TT_BF16;
    case ScalarType::Half: return TT_F16;
    default: break;
  }
  TT_CHECK(false, op, ": expected ", name, " of float32, bfloat16 or float16, got ",
           describe(tensor));
  return TT_F32;
}

Place place_of(const Tensor& tensor) {
  Place place;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
  return place;
}

std::string describe(const Place& place) {
  if (place.type == aoti_torch_device_type_cpu()) return "the CPU";
  return place.is_cuda() ? "cuda:" + std::to_string(place.index) : "another device";
}

void check_place(const char* op, const char* name, const Tensor& tensor, const Place& place) {
  const Place found = place_of(tensor);
  const bool same = found.type == place.type && (!place.is_cuda() || found.index == place.index);
  TT_CHECK(same, op, ": expected ", name, " on ", describe(place), ", like the others, got it on ",
           describe(found));
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  int rank, const Place& place) {
  TT_CHECK(tensor.scalar_type() == dtype && (rank < 0 || tensor.dim() == rank), op, ": expected ",
           name, " of ", rank < 0 ? "" : std::to_string(rank) + "-D ", dtype_name(dtype), ", got ",
           describe(tensor));
  check_place(op, name, tensor, place);
}

void check_out(const char* op, const char* name, const Tensor& out, ScalarType dtype,
               const int64_t* sizes, int64_t rank, const Place& place) {
  bool same = out.dim() == rank;
  std::string wanted = "[";
  for (int64_t d = 0; d < rank; ++d) {
    same = same && out.sizes()[d] == sizes[d];
    wanted += (d ? ", " : "") + std::to_string(sizes[d]);
  }
  TT_CHECK(same && out.scalar_type() == dtype && out.is_contiguous(), op, ": expected contiguous ",
           name, " of ", wanted, "] ", dtype_name(dtype), ", got ", describe(out));
  check_place(op, name, out, place);
}

Rows::Rows(const Tensor& x) : tensor(x) {
  const auto sizes = x.sizes();
  const int64_t rank = int64_t(sizes.size());
  K = sizes[rank - 1];
  for (int64_t d = 0; d + 1 < rank; ++d) M *= sizes[d];
  const bool adjacent = K <= 1 || x.strides()[rank - 1] == 1;
  if (!adjacent || !rows_have_one_stride(x, &row_stride)) {
    tensor = torch::stable::contiguous(x);
    row_stride = K;
  }
  data = tensor.const_data_ptr();
}

namespace {

Tensor empty_strided(const Place& place, const int64_t* sizes, const int64_t* strides, int64_t rank,
                     ScalarType dtype) {
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides, code, place.type, place.index, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty_strided_cpu(const int64_t* sizes, const int64_t* strides, int64_t rank,
                         ScalarType dtype) {
  const Tensor tensor = empty_strided(Place::cpu(), sizes, strides, rank, dtype);
  const int64_t element = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Char ? 1 : 2;
  if (rank > 0) advise_huge_pages(tensor.mutable_data_ptr(), sizes[0] * strides[0] * element);
  return tensor;
}

Tensor empty(const Place& place, const int64_t* sizes, int64_t rank, ScalarType dtype) {
  std::vector<int64_t> strides(size_t(rank), 1);
  for (int64_t d = rank - 2; d >= 0; --d)
    strides[size_t(d)] = strides[size_t(d) + 1] * std::max<int64_t>(sizes[d + 1], 1);
  if (place.is_cuda()) return empty_strided(place, sizes, strides.data(), rank, dtype);
  return empty_strided_cpu(sizes, strides.data(), rank, dtype);
}

Tensor empty_cpu(const int64_t* sizes, int64_t rank, ScalarType dtype) {
  return empty(Place::cpu(), sizes, rank, dtype);
}

Tensor empty_rows(const Tensor& x, int64_t last, ScalarType dtype) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return empty(place_of(x), shape.data(), int64_t(shape.size()), dtype);
}

PackedWeight::PackedWeight(const char* op, const Tensor& weight, int64_t n, int64_t K)
    : tensor(weight), N(n) {
  check_tensor(op, "weight", weight, ScalarType::Char, -1);
  if (weight.dim() == 1) {
    const int64_t bytes = tt_int8_packed_size(N, K);
    TT_CHECK(weight.numel() == bytes, op, ": expected a packed weight of ", bytes,
             " bytes (from int8_pack) for N=", N, " and the K=", K, " of the other operand, got ",
             weight.numel());
    TT_CHECK(weight.is_contiguous(), op, ": expected a contiguous packed weight");
  } else {
    TT_CHECK(weight.dim() == 2 && weight.sizes()[0] == N && weight.sizes()[1] == K, op,
             ": expected weight [N=", N, ", K=", K, "] int8 or its packed form, got ",
             describe(weight));
    const Rows rows(weight);
    const int64_t bytes = tt_int8_packed_size(N, K);
    tensor = empty_cpu(&bytes, 1, ScalarType::Char);
    const tt_parallel pool = torch_pool();
    check_status(tt_int8_pack(static_cast<const int8_t*>(rows.data), rows.row_stride, N, K,
                              static_cast<int8_t*>(tensor.mutable_data_ptr()), &pool));
  }
  data = static_cast<const int8_t*>(tensor.const_data_ptr());
}

}  // namespace trimtab
