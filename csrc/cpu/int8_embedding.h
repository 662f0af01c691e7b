// What int8_embedding and int8_embedding_bag share: row arithmetic, an instruction set at a time, and checks.
#pragma once
#include <trimtab/int8_embedding_bag.h>

namespace trimtab {

struct EmbeddingLanes {
  // out = round(float(q) * scale), q [n]
  void (*dequantize)(const int8_t* q, float scale, int64_t n, void* out, tt_dtype dtype);
  // acc = acc + float(q) * scale * weight, each step rounded; q [n]
  void (*add)(const int8_t* q, float scale, float weight, int64_t n, float* acc);
  // out = round(acc / divisor), acc [n]
  void (*finish)(const float* acc, float divisor, int64_t n, void* out, tt_dtype dtype);
};
extern const EmbeddingLanes embedding_lanes_scalar, embedding_lanes_avx2, embedding_lanes_avx512;

inline const EmbeddingLanes& embedding_lanes(tt_isa isa) {
  if (isa >= TT_ISA_AVX512) return embedding_lanes_avx512;
  return isa == TT_ISA_SCALAR ? embedding_lanes_scalar : embedding_lanes_avx2;
}

inline int64_t index_at(const void* indices, int32_t size, int64_t i) {
  return size == 4 ? static_cast<const int32_t*>(indices)[i]
                   : static_cast<const int64_t*>(indices)[i];
}

// The table, the indices and the output dtype; `op` names the op in messages.
tt_status check_embedding(const char* op, const tt_int8_table* table, const void* indices,
                          int32_t index_size, int64_t count, tt_dtype out_dtype);

}  // namespace trimtab
