#include "cpu/f32x16.h"
#include "cpu/int8_embedding_lanes.h"

namespace trimtab {

const EmbeddingLanes embedding_lanes_avx512 = {dequantize<F32x16>, add, finish<F32x16>};

}  // namespace trimtab
