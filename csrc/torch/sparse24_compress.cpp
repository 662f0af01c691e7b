// values [N, K4 / 2], indices [N, ceil(K4 / 8)] = sparse24_compress(weight [N, K]), K4 = K rounded up to 4
//
// sparse24_pack gives values in rows on whole 16 bytes and metadata instead, as sparse24_linear takes them on a
// GPU; sparse24_pack_both those of the transposed weight too, from one pass.
#include <trimtab/sparse24_compress.h>

#include "adapter.h"
#include "cuda.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "sparse24_compress";

tt_dtype weight_dtype(const Tensor& weight) {
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  TT_CHECK(weight.dim() == 2 && (int8 || is_float(weight.scalar_type())), kOp,
           ": expected weight [N, K] of float32, bfloat16, float16 or int8, got ",
           describe(weight));
  return int8 ? TT_I8 : float_dtype(kOp, "weight", weight);
}

int64_t size_of(tt_dtype dtype) { return dtype == TT_F32 ? 4 : dtype == TT_I8 ? 1 : 2; }

// The outputs of one direction on a GPU, for a matrix [N, K].
struct Packed {
  Tensor wide;  // values in rows of whole 16 bytes
  std::optional<Tensor> indices, metadata;
  int64_t kept;
  tt_sparse24_compressed out;

  Packed(const Place& place, const Tensor& weight, tt_dtype dtype, int64_t N, int64_t K, bool pack)
      : kept((K + 3) / 4 * 2) {
    const int64_t each = 16 / size_of(dtype), width = (kept + each - 1) / each * each;
    const int64_t sizes[] = {N, width};
    wide = empty(place, sizes, 2, weight.scalar_type());
    out = {wide.mutable_data_ptr(), width * size_of(dtype), nullptr, nullptr};
    if (pack) {
      const int64_t words[] = {(N + 15) / 16, (K + 63) / 64, 32};
      metadata = empty(place, words, 3, ScalarType::Int);
      out.metadata = static_cast<uint32_t*>(metadata->mutable_data_ptr());
    } else {
      const int64_t bytes[] = {N, (K + 7) / 8};
      indices = empty(place, bytes, 2, ScalarType::Byte);
      out.indices = static_cast<uint8_t*>(indices->mutable_data_ptr());
    }
  }

  Tensor values() { return torch::stable::narrow(wide, 1, 0, kept); }
};

void run_cuda(const CudaCall& call, const Tensor& weight, tt_dtype dtype, Packed& out,
              Packed* transposed) {
  const Rows rows = cuda_rows(weight);
  check_status(call.library.sparse24_compress(
      rows.data, dtype, rows.row_stride, rows.M, rows.K, &out.out,
      transposed == nullptr ? nullptr : &transposed->out, call.stream));
}

std::tuple<Tensor, Tensor> sparse24_compress(const Tensor& weight) {
  const tt_dtype dtype = weight_dtype(weight);
  const Place place = place_of(weight);
  const int64_t N = weight.sizes()[0], K = weight.sizes()[1];
  if (place.is_cuda()) {
    if (!cuda_serves(kOp, place)) {
      const auto results = call_overload("trimtab::sparse24_compress", "torch", weight);
      return {torch::stable::detail::to<Tensor>(results[0]),
              torch::stable::detail::to<Tensor>(results[1])};
    }
    const CudaCall call(kOp, place);
    Packed out(place, weight, dtype, N, K, /*pack=*/false);
    run_cuda(call, weight, dtype, out, nullptr);
    return {torch::stable::contiguous(out.values()), *out.indices};
  }
  const int64_t sizes[] = {N, (K + 3) / 4 * 2}, bytes[] = {N, (K + 7) / 8};
  const Tensor values = empty_cpu(sizes, 2, weight.scalar_type());
  const Tensor indices = empty_cpu(bytes, 2, ScalarType::Byte);
  const Rows rows(weight);
  const tt_parallel pool = torch_pool();
  check_status(tt_sparse24_compress(rows.data, dtype, rows.row_stride, rows.M, rows.K,
                                    values.mutable_data_ptr(),
                                    static_cast<uint8_t*>(indices.mutable_data_ptr()), &pool));
  return {values, indices};
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> sparse24_pack(const Tensor& weight) {
  const tt_dtype dtype = weight_dtype(weight);
  const Place place = place_of(weight);
  if (!cuda_serves(kOp, place)) {
    const auto results = call_overload("trimtab::sparse24_pack", "torch", weight);
    return {torch::stable::detail::to<Tensor>(results[0]),
            torch::stable::detail::to<Tensor>(results[1])};
  }
  const CudaCall call(kOp, place);
  Packed out(place, weight, dtype, weight.sizes()[0], weight.sizes()[1], /*pack=*/true);
  run_cuda(call, weight, dtype, out, nullptr);
  return {out.values(), *out.metadata};
}

Four sparse24_pack_both(const Tensor& weight) {
  const tt_dtype dtype = weight_dtype(weight);
  const Place place = place_of(weight);
  if (!cuda_serves(kOp, place)) {
    const auto results = call_overload("trimtab::sparse24_pack_both", "torch", weight);
    return {torch::stable::detail::to<Tensor>(results[0]),
            torch::stable::detail::to<Tensor>(results[1]),
            torch::stable::detail::to<Tensor>(results[2]),
            torch::stable::detail::to<Tensor>(results[3])};
  }
  const CudaCall call(kOp, place);
  const int64_t N = weight.sizes()[0], K = weight.sizes()[1];
  Packed out(place, weight, dtype, N, K, /*pack=*/true);
  Packed transposed(place, weight, dtype, K, N, /*pack=*/true);
  run_cuda(call, weight, dtype, out, &transposed);
  return {out.values(), *out.metadata, transposed.values(), *transposed.metadata};
}

}  // namespace

TT_OPS(m) {
  m.def("sparse24_compress(Tensor weight) -> (Tensor, Tensor)");
  m.def("sparse24_compress.torch(Tensor weight) -> (Tensor, Tensor)");
  m.def("sparse24_pack(Tensor weight) -> (Tensor, Tensor)");
  m.def("sparse24_pack.torch(Tensor weight) -> (Tensor, Tensor)");
  m.def("sparse24_pack_both(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse24_pack_both.torch(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
}

TT_CPU_OPS(m) { m.impl("sparse24_compress", TORCH_BOX(&sparse24_compress)); }

TT_CUDA_OPS(m) {
  m.impl("sparse24_compress", TORCH_BOX(&sparse24_compress));
  m.impl("sparse24_pack", TORCH_BOX(&sparse24_pack));
  m.impl("sparse24_pack_both", TORCH_BOX(&sparse24_pack_both));
}

}  // namespace trimtab
