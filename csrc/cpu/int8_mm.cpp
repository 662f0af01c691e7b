// int8_mm: rows come as int8 with their scales. The product itself is in int8_product.cpp.
#include <trimtab/int8_mm.h>

#include <cstring>

#include "cpu/int8_product.h"
#include "cpu/status.h"

namespace trimtab {

constexpr Int8Kernel kKernels[] = {
    {TT_ISA_SCALAR, 4, 1, 1, int8_pack_a_scalar, int8_quantize_a_scalar, int8_block_scalar,
     int8_epilogue_scalar},
    {TT_ISA_AVX2, 4, 2, 1, int8_pack_a_avx2, int8_quantize_a_avx2, int8_block_avx2,
     int8_epilogue_avx2},
    {TT_ISA_AVXVNNI, 5, 1, 1, int8_pack_a_avxvnni, int8_quantize_a_avxvnni, int8_block_avxvnni,
     int8_epilogue_avx2},
    {TT_ISA_AVX512, 12, 1, 1, int8_pack_a_avx512, int8_quantize_a_avx512, int8_block_avx512,
     int8_epilogue_avx512},
    {TT_ISA_AMX, 16, 1, 2, int8_pack_a_amx, int8_quantize_a_amx, int8_block_amx,
     int8_epilogue_avx512},
};

const Int8Kernel& int8_kernel(tt_isa isa, int64_t M, int64_t weight_bytes) {
  // A tile of 16 rows costs the same for one: up to 8 rows the vector kernel streams the weight faster
  // (8 x 4096 x 4096: 586 us against 710; even at 12), up to 4 where the weight is in L2 (1024 x 1024:
  // 4 rows 23.5 us against 24.3, 5 rows 27 against 25, 8 rows 41 against 25).
  const int64_t few = weight_bytes > kWeightInL2 ? 8 : 4;
  if (isa == TT_ISA_AMX && M <= few) isa = TT_ISA_AVX512;
  return kKernels[isa];
}

namespace {

struct Int8Rows {
  const int8_t* a;
  int64_t a_stride, K;
  const float* scale;
};

void fill(const void* self, const Int8Kernel& kernel, int64_t m, int rows, void* panel,
          float* scale) {
  const Int8Rows& from = *static_cast<const Int8Rows*>(self);
  kernel.pack_a(from.a + m * from.a_stride, from.a_stride, rows, from.K, panel);
  std::memcpy(scale, from.scale + m, size_t(rows) * sizeof(float));
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_mm(const int8_t* a, int64_t a_stride, const float* a_scale,
                     const int8_t* b_packed, int64_t M, int64_t N, int64_t K,
                     const tt_epilogue* epilogue, const tt_parallel* parallel) {
  const tt_status status = check_product("int8_mm", M, N, K, b_packed, epilogue, true);
  if (status != TT_OK) return status;
  if (M > 0 && ((a == nullptr && K > 0) || a_scale == nullptr)) {
    return set_error(TT_INVALID_ARGUMENT, "int8_mm: a or a_scale is NULL");
  }
  const Int8Rows rows{a, a_stride, K, a_scale};
  return run_product("int8_mm", {fill, &rows}, b_packed, M, N, K, *epilogue, parallel);
}
