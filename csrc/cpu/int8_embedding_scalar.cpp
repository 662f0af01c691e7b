#include "cpu/int8_embedding_lanes.h"
#include "math/f32x1.h"

namespace trimtab {

const EmbeddingLanes embedding_lanes_scalar = {dequantize<F32x1>, add, finish<F32x1>};

}  // namespace trimtab
