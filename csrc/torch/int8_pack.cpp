// packed = int8_pack(weight [N, K] int8);  weight = int8_unpack(packed, N, K)
#include <trimtab/int8_pack.h>

#include "adapter.h"

namespace trimtab {
namespace {

Tensor int8_pack(const Tensor& weight) {
  check_tensor("int8_pack", "weight", weight, ScalarType::Char, 2);
  return PackedWeight("int8_pack", weight, weight.sizes()[0], weight.sizes()[1]).tensor;
}

Tensor int8_unpack(const Tensor& packed, int64_t N, int64_t K) {
  check_tensor("int8_unpack", "packed", packed, ScalarType::Char, 1);
  TT_CHECK(N >= 0 && K >= 0, "int8_unpack: expected sizes >= 0, got N=", N, " K=", K);
  const PackedWeight weight("int8_unpack", packed, N, K);
  const int64_t sizes[] = {N, K};
  const Tensor out = empty_cpu(sizes, 2, ScalarType::Char);
  const tt_parallel pool = torch_pool();
  check_status(
      tt_int8_unpack(weight.data, N, K, static_cast<int8_t*>(out.mutable_data_ptr()), K, &pool));
  return out;
}

}  // namespace

TT_OPS(m) {
  m.def("int8_pack(Tensor weight) -> Tensor");
  m.def("int8_unpack(Tensor packed, int N, int K) -> Tensor");
}

TT_CPU_OPS(m) {
  m.impl("int8_pack", TORCH_BOX(&int8_pack));
  m.impl("int8_unpack", TORCH_BOX(&int8_unpack));
}

}  // namespace trimtab
