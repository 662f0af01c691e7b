#include "cpu/f32x8.h"
#include "cpu/int8_embedding_lanes.h"

namespace trimtab {

const EmbeddingLanes embedding_lanes_avx2 = {dequantize<F32x8>, add, finish<F32x8>};

}  // namespace trimtab
